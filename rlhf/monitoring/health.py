"""Warnings when a run stops learning or collapses, from its metrics: the conditions and the advice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Values = Mapping[str, float]


class Finding(NamedTuple):
    """A condition on the metrics, and what to advise when it holds.

    `holds(first, last)` gets the metrics of the first steps in which the policy was updated, and of the last
    steps.
    """

    name: str
    holds: Callable[[Sequence[Values], Sequence[Values]], bool]
    advice: str


class HealthWatch:
    """Checks the metrics of each step; a finding that holds `patience` steps in a row is reported once."""

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.steps: deque[Values] = deque(maxlen=patience)
        self.reported: set[str] = set()
        self.some_completion_ended = False
        self.first: list[Values] = []

    def recall(self, values: Values) -> None:
        """Takes the metrics of a step that was made before the run was resumed, without reporting anything.

        The first steps of a resumed run are thus those of the whole run.
        """
        self.some_completion_ended |= values.get("length/truncated", 0.0) < 1.0
        if "perplexity" in values and len(self.first) < self.patience:
            self.first.append(values)

    def at_once(self, values: Mapping[str, float | None], whose: str) -> list[str]:
        """Large shares of cut completions and of groups without signal, said when they are first seen.

        `values`: metrics of a step, or an evaluation; `whose`: the completions that they are about, in words.
        """
        new: list[str] = []
        for (name, *other_names), advice in AT_ONCE.items():
            share = next((v for n in (name, *other_names) if (v := values.get(n)) is not None), 0.0)
            if share >= MANY and name not in self.reported:
                self.reported.add(name)
                new.append(advice.format(share=share, whose=whose))
        return new

    def check(self, values: Values) -> list[str]:
        """Takes the metrics of the next step and returns the texts of findings that have lasted."""
        self.recall(values)
        self.steps.append(values)
        if len(self.steps) < self.patience:
            return []
        new = [f for f in FINDINGS if f.name not in self.reported and f.holds(self.first, self.steps)]
        if not self.some_completion_ended:
            new = [NEVER_ENDED if f.name == "truncated" else f for f in new]
        self.reported.update(f.name for f in new)
        if NEVER_ENDED in new:
            self.reported.add("truncated")
        return [f"{f.advice} ({len(self.steps)} steps in a row)" for f in new]


def _always(name: str, expected: float) -> Callable[[Sequence[Values], Sequence[Values]], bool]:
    return lambda _, last: all(values.get(name) == expected for values in last)


def _constant_reward(_: Sequence[Values], last: Sequence[Values]) -> bool:
    reward = last[0].get("reward/mean")
    same = reward is not None and all(values.get("reward/mean") == reward for values in last)
    return same and all(values.get("reward/std", 0.0) == 0.0 for values in last)


def _always_skipped(_: Sequence[Values], last: Sequence[Values]) -> bool:
    return all(values.get("update/skipped", 0.0) > 0 for values in last)


def _nothing_moves(first: Sequence[Values], last: Sequence[Values]) -> bool:
    """The gradient is zero although some advantages are not; all of them zero is a finding of its own."""
    has_signal = any(values.get("advantage/zero_fraction", 0.0) < 1.0 for values in last)
    return has_signal and _always("grad_norm", 0.0)(first, last)


def _collapses(first: Sequence[Values], last: Sequence[Values]) -> bool:
    """Length up, perplexity down and KL up, all three compared with the first steps of the run.

    PPO-max (arXiv:2307.04964 section 5) names the three signs but gives no numbers; these are rules of thumb.
    """
    if not all(values.keys() >= PATTERN for values in (*first, *last)):
        return False

    def mean(steps: Sequence[Values], name: str) -> float:
        return sum(values[name] for values in steps) / len(steps)

    before, now = ({name: mean(steps, name) for name in PATTERN} for steps in (first, last))
    longer = now["length/mean"] >= 1.25 * before["length/mean"]
    flatter = now["perplexity"] <= 0.8 * before["perplexity"]
    further = now["kl/ref"] >= max(0.1, 2.0 * before["kl/ref"])
    return longer and flatter and further


MANY = 0.5
"""Share of completions that are cut, or in groups without signal, which is said as soon as it is seen."""
# by the names of the share in the metrics of a step and in an evaluation
AT_ONCE = {
    ("length/truncated", "truncated"): (
        "{share:.0%} of the {whose} completions are cut at the token limit; raise "
        "rollout.max_completion_tokens, or ask for shorter completions in the prompts"
    ),
    ("advantage/zero_fraction", "no_signal"): (
        "{share:.0%} of the {whose} completions are in groups without signal, where all rewards are equal; "
        "take prompts of another difficulty, a larger rollout.group_size or a higher rollout.temperature"
    ),
}
# the metrics that `_collapses` compares
PATTERN = {"length/mean", "perplexity", "kl/ref"}
FINDINGS = (
    Finding(
        "reward",
        _constant_reward,
        "every completion gets the same reward, so there is nothing to learn from; look at RUN/samples.jsonl "
        "and try the reward function on a completion that should score well",
    ),
    Finding(
        "advantage",
        _always("advantage/zero_fraction", 1.0),
        "all advantages are zero: within each group all rewards are equal; take prompts of another "
        "difficulty, a larger rollout.group_size or a higher rollout.temperature",
    ),
    Finding(
        "truncated",
        _always("length/truncated", 1.0),
        "every completion is cut at the token limit; raise rollout.max_completion_tokens, or ask for shorter "
        "completions in the prompts",
    ),
    Finding(
        "broken",
        _always_skipped,
        "updates are skipped because their gradient is not finite; lower learner.lr, or try "
        "model.dtype=float32",
    ),
    Finding(
        "gradient",
        _nothing_moves,
        "the gradient is exactly zero although there are advantages, so no parameter changes; check that "
        "parameters are trainable and that the loss mask is True for some tokens",
    ),
    Finding(
        "collapse",
        _collapses,
        "completions get longer, their perplexity falls and the KL to the reference rises: the policy "
        "has probably found a pattern that the reward function favours without being better; read "
        "RUN/samples.jsonl, raise algorithm.kl.coef (or set algorithm.kl.target), lower learner.lr, or "
        "normalise and clip the reward as algorithm.name=ppo_max does",
    ),
)
NEVER_ENDED = Finding(
    "ended",
    _always("length/truncated", 1.0),
    "no completion of this run has ended by itself: every one is cut at the token limit, so the "
    "end-of-sequence token is never trained; raise rollout.max_completion_tokens, and check that the chat "
    "template and the stop tokens are the model's own",
)
