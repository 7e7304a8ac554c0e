"""Warnings when a run stops learning or collapses, from its metrics: the conditions and the advice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Values = Mapping[str, float]
Condition = Callable[[Sequence[Values], Sequence[Values]], bool]


def pairs_are_given(values: Mapping[str, Any]) -> bool:
    """Whether a step compared completions of a dataset with each other.

    Rewards, lengths and truncation in its metrics are then those of the data, not of the policy.
    """
    return "pairs/accuracy" in values and "offline/kept_fraction" in values


class Finding(NamedTuple):
    """A condition on the metrics, and what to advise when it holds.

    `holds(first, last)` gets the metrics of the first steps in which the policy was updated, and of the last
    steps.
    """

    name: str
    holds: Condition
    advice: str


class HealthWatch:
    """Checks the metrics of each step; a finding that holds `patience` steps in a row is reported once."""

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.steps: deque[Values] = deque(maxlen=patience)
        self.reported: set[str] = set()
        self.some_completion_ended = False
        self.first: list[Values] = []
        self.highest_entropy = 0.0
        """`topk_entropy` of the evaluation of pairs in which it was highest so far."""
        self.last_margin: float | None = None
        """`margin` of the last evaluation of pairs."""

    def recall(self, values: Values) -> None:
        """Takes the metrics of a step that was made before the run was resumed, without reporting anything.

        The first steps of a resumed run are thus those of the whole run.
        """
        self.some_completion_ended |= values.get("length/truncated", 0.0) < 1.0
        if "perplexity" in values and len(self.first) < self.patience:
            self.first.append(values)

    def at_once(self, values: Mapping[str, Any], whose: str) -> list[str]:
        """Large shares of cut completions and of groups without signal, said when they are first seen.

        `values`: metrics of a step, or an evaluation; `whose`: the completions that they are about, in words.
        """
        new: list[str] = []
        for (name, *other_names), advice in AT_ONCE.items():
            if name in _meaningless(values):
                continue
            share = next((v for n in (name, *other_names) if (v := values.get(n)) is not None), 0.0)
            if share >= MANY and name not in self.reported:
                self.reported.add(name)
                new.append(advice.format(share=share, whose=whose))
        return new

    def evaluated(self, record: Mapping[str, Any]) -> list[str]:
        """Takes an evaluation, of this run or of before it was resumed; returns what its pairs give to say.

        The sign of over-optimisation is that of arXiv:2410.11677 (section 4.3): the entropy of the most
        probable tokens keeps falling while the margin grows. How far it has to fall is a rule of thumb.
        """
        pairs: Mapping[str, float] | None = record.get("pairs")
        if not pairs:
            return []
        entropy, margin, before = pairs["topk_entropy"], pairs["margin"], self.last_margin
        self.highest_entropy, self.last_margin = max(self.highest_entropy, entropy), margin
        fallen = 1.0 - entropy / self.highest_entropy if self.highest_entropy else 0.0
        grows = before is not None and margin > before
        if fallen < MUCH_ENTROPY or not grows or "likelihood" in self.reported:
            return []
        self.reported.add("likelihood")
        return [LIKELIHOOD.format(fallen=fallen)]

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


def _always(name: str, expected: float) -> Condition:
    return lambda _, last: all(values.get(name) == expected for values in last)


def _compares_pairs(values: Mapping[str, Any]) -> bool:
    """Whether a step, or an evaluation, is of preference pairs."""
    return "pairs/accuracy" in values or bool(values.get("pairs"))


def _distills(values: Mapping[str, Any]) -> bool:
    """Whether a step learned from the exact KL to a teacher alone, without advantages."""
    return "kl/exact" in values and "advantage/zero_fraction" not in values and not _compares_pairs(values)


def _learns_without_advantages(values: Mapping[str, Any]) -> bool:
    return _compares_pairs(values) or _distills(values)


def _learns_whatever_the_reward(values: Mapping[str, Any]) -> bool:
    """Whether equal rewards teach: a step of pairs, of a teacher, or of completions that are imitated."""
    imitates = "offline/kept_fraction" in values and values.get("advantage/zero_fraction") == 0.0
    return _learns_without_advantages(values) or imitates


def _meaningless(values: Mapping[str, Any]) -> set[str]:
    """Shares in `AT_ONCE` by which nothing is learned here: pairs teach without advantages, and given
    completions are not cut by any setting."""
    names = {"advantage/zero_fraction"} if _compares_pairs(values) else set[str]()
    return names | ({"length/truncated"} if pairs_are_given(values) else set[str]())


def _unless(other: Callable[[Values], bool], holds: Condition) -> Condition:
    """The condition, where no step is one of those `other` ones, to which it does not apply."""
    return lambda first, last: not any(map(other, last)) and holds(first, last)


def _no_pair_teaches(first: Sequence[Values], last: Sequence[Values]) -> bool:
    return all(map(_compares_pairs, last)) and _always("grad_norm", 0.0)(first, last)


def _trend(steps: Sequence[Values], name: str) -> float:
    """The slope of a metric over the steps, by least squares, times a positive number."""
    middle = (len(steps) - 1) / 2
    return sum((i - middle) * values[name] for i, values in enumerate(steps))


def _displaced(_: Sequence[Values], last: Sequence[Values]) -> bool:
    """Likelihood displacement (arXiv:2410.08847), by a rule of thumb: chosen completions are below
    `DISPLACED` in every step and falling, while the margin grows."""
    chosen, margin = "pairs/chosen_logratio", "pairs/margin"
    if not all(values.keys() >= {chosen, margin} for values in last):
        return False
    below = all(values[chosen] < DISPLACED for values in last)
    return below and _trend(last, chosen) < 0 < _trend(last, margin)


def _one_place_wins(_: Sequence[Values], last: Sequence[Values]) -> bool:
    """A judge that nearly always prefers the same place, whichever completion stands there."""
    if sum(values.get("duels/asked", 0.0) for values in last) < ENOUGH_DUELS:
        return False
    shares = [values.get("duels/first", 0.5) for values in last]
    return min(shares) > ONE_PLACE or max(shares) < 1.0 - ONE_PLACE


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
DISPLACED = -5.0
"""Mean log-ratio of chosen completions to the reference, in nats, below which they have become unlikely."""
ONE_PLACE = 0.9
"""Share of the comparisons that one place wins, beyond which a judge judges the place; a rule of thumb."""
ENOUGH_DUELS = 20
"""Duels, over all steps looked at, from which this can be said."""
MUCH_ENTROPY = 0.3
"""Share by which the entropy of the most probable tokens has to be below its highest."""
LIKELIHOOD = (
    "the entropy of the 10 most probable tokens of held-out chosen completions is {fallen:.0%} below its "
    "highest while the margin of the pairs still grows, which is the sign of an over-optimised preference "
    "loss; stop, or keep the best checkpoint (checkpoint.keep_best)"
)
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
        _unless(_learns_whatever_the_reward, _constant_reward),
        "every completion gets the same reward, so there is nothing to learn from; look at RUN/samples.jsonl "
        "and try the reward function on a completion that should score well",
    ),
    Finding(
        "advantage",
        _unless(_compares_pairs, _always("advantage/zero_fraction", 1.0)),
        "all advantages are zero: within each group all rewards are equal; take prompts of another "
        "difficulty, a larger rollout.group_size or a higher rollout.temperature",
    ),
    Finding(
        "truncated",
        _unless(pairs_are_given, _always("length/truncated", 1.0)),
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
        _unless(_learns_without_advantages, _nothing_moves),
        "the gradient is exactly zero although there are advantages, so no parameter changes; check that "
        "parameters are trainable and that the loss mask is True for some tokens",
    ),
    Finding(
        "saturated",
        _no_pair_teaches,
        "the gradient is exactly zero although pairs are compared, so no parameter changes; look at "
        "pairs/weight: at 0 the loss of every pair is past its bound or margin (widen it), otherwise check "
        "that parameters are trainable",
    ),
    Finding(
        "displaced",
        _displaced,
        "chosen completions become less likely while the margin grows: pairs/chosen_logratio is below "
        f"{DISPLACED:g} nats and falls; lower learner.lr or raise algorithm.beta, add an anchor "
        "(algorithm.name=rpo or dpop), or refresh the pairs (online)",
    ),
    Finding(
        "place",
        _one_place_wins,
        "the judge prefers the completion in one place in more than 9 of 10 comparisons (duels/first), so it "
        "judges the place and not the text; keep reward.preference.both_orders=true, which makes ties of "
        "these duels, and take another judge or template",
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
