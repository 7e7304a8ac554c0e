"""Silent no-ops and collapse, said aloud: a run that goes on without learning, or learns to cheat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Values = Mapping[str, float]


class Finding(NamedTuple):
    """`holds(first, last)` looks at the first few steps in which the policy learned, and at the last few."""

    name: str
    holds: Callable[[Sequence[Values], Sequence[Values]], bool]
    advice: str


class HealthWatch:
    """Looks at each step's metrics; a finding that held for `patience` steps in a row is told once a run."""

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.steps: deque[Values] = deque(maxlen=patience)
        self.told: set[str] = set()
        self.some_completion_ended = False
        self.first: list[Values] = []

    def recall(self, values: Values) -> None:
        """A step from before a resumption: the beginning of a run stays its beginning."""
        self.some_completion_ended |= values.get("length/truncated", 0.0) < 1.0
        if "perplexity" in values and len(self.first) < self.patience:
            self.first.append(values)

    def look(self, values: Values) -> list[str]:
        """Takes the metrics of one step and returns what is new to tell."""
        self.recall(values)
        self.steps.append(values)
        if len(self.steps) < self.patience:
            return []
        new = [f for f in FINDINGS if f.name not in self.told and f.holds(self.first, self.steps)]
        if not self.some_completion_ended:
            new = [NEVER_ENDED if f.name == "truncated" else f for f in new]
        self.told.update(f.name for f in new)
        if NEVER_ENDED in new:
            self.told.add("truncated")
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
    """Without any advantage there is rightly no gradient, and that has its own finding."""
    has_signal = any(values.get("advantage/zero_fraction", 0.0) < 1.0 for values in last)
    return has_signal and _always("grad_norm", 0.0)(first, last)


def _collapses(first: Sequence[Values], last: Sequence[Values]) -> bool:
    """Length up, perplexity down and KL up, all three against the first steps of the run.

    PPO-max (arXiv:2307.04964 section 5) names the three and no numbers; these are rules of thumb.
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
        "every completion is cut at the token limit; raise rollout.max_completion_tokens, or ask for less",
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
        "parameters are trainable and that the loss mask leaves tokens to learn from",
    ),
    Finding(
        "collapse",
        _collapses,
        "completions get longer, their perplexity falls and the KL to the reference rises: the policy "
        "settles on a pattern that pleases the reward and means nothing; read RUN/samples.jsonl, raise "
        "algorithm.kl.coef (or give it a target), lower learner.lr, constrain the reward (ppo_max)",
    ),
)
NEVER_ENDED = Finding(
    "ended",
    _always("length/truncated", 1.0),
    "no completion of this run has ended by itself: every one is cut at the token limit, so the "
    "end-of-sequence token is never trained; raise rollout.max_completion_tokens, and check that the chat "
    "template and the stop tokens are the model's own",
)
