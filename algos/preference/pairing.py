"""Which completions of a group are compared with which, and how sure it is that the first is the better one.

A rule turns a scored group into comparisons. With rewards .1 .9 .5 .2 (completions 0 to 3):

    best_worst    1 over 0, the default        first_two    1 over 0
    best_second   1 over 2                     all          1 over 2, 1 over 3, 1 over 0, 2 over 3, ...
    best_random   1 over any other one, drawn by the number of the group
    of_data       best_worst of what the data has      dno_prct    every two with a large gap

Completions without a reward are in no comparison, and equal rewards are no comparison. RLHFlow's script picks
by the reward less a penalty for length but orients and drops ties by the raw one, which may turn a pair
around; here both are done by the rewards that are given (arXiv:2405.07863).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rlhf.types import Source


@dataclass(frozen=True, slots=True)
class Comparison:
    """Completion `better` of a group over completion `other`; example: `Comparison(0, 3, 0.8)`."""

    better: int
    other: int | None
    """None: `better` is judged alone (a single label)."""
    probability: float = 1.0
    """P(`better` is better than `other`), or P(`better` is good) where there is no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a rule sees of a group; one entry for each completion."""

    rewards: Sequence[float | None]
    tokens: Sequence[int]
    truncated: Sequence[bool]
    sources: Sequence[Source] = ()
    """What wrote each completion; empty where a rule does not ask."""
    duels: Mapping[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    """(i, j) -> P(i is better than j), where a label or a judge says so."""
    draw: int = 0
    """The number of the group among those that the run draws."""


Rule = Callable[[Scored], list[Comparison]]
"""Comparisons of one group, of completions with unequal rewards and with the better one first."""

Label = Callable[[Scored, Comparison], Comparison | None]
"""The comparison with its probability, turned around where that is below 1/2; None: it is not known."""


def best_worst(scored: Scored) -> list[Comparison]:
    """The highest reward over the lowest, the first of equals (RLHFlow's `max_min`, arXiv:2405.07863)."""
    order = _by_reward(scored)
    worst = min(order, key=lambda i: (_reward(scored, i), i), default=None)
    return _over(scored, order[0], worst) if worst is not None else []


def best_second(scored: Scored) -> list[Comparison]:
    """The highest reward over the second highest (RLHFlow's `max_max`)."""
    order = _by_reward(scored)
    return _over(scored, order[0], order[1]) if len(order) > 1 else []


def best_random(scored: Scored) -> list[Comparison]:
    """The highest reward over any other, drawn by `scored.draw`: a run that is repeated draws the same."""
    order = _by_reward(scored)
    if len(order) < 2:
        return []
    return _over(scored, order[0], random.Random(scored.draw).choice(sorted(order[1:])))


def first_two(scored: Scored) -> list[Comparison]:
    """The first two completions that have a reward, the better one first (online DPO, arXiv:2402.04792)."""
    known = sorted(_by_reward(scored))
    return _over(scored, known[0], known[1]) if len(known) > 1 else []


def every_pair(scored: Scored) -> list[Comparison]:
    """Every two completions with unequal rewards."""
    order = _by_reward(scored)
    return [c for place, i in enumerate(order) for j in order[place + 1 :] for c in _over(scored, i, j)]


def of_data(scored: Scored) -> list[Comparison]:
    """The highest over the lowest of the dataset's own completions; samples are beside them (HyPO, SPAC)."""
    data = [r if s == Source.DATA else None for r, s in zip(scored.rewards, scored.sources, strict=True)]
    return best_worst(replace(scored, rewards=data))


def dno_prct(scored: Scored) -> list[Comparison]:
    """Every two of which the better has a reward of at least 5 of 6 and leads by 2, or by 1 if the policy
    wrote it (DNO-Prct, arXiv:2404.03715 algorithm 2).
    """

    def is_clear(comparison: Comparison) -> bool:
        own = scored.sources[comparison.better] != Source.DATA
        return _reward(scored, comparison.better) >= 5.0 and _gap(scored, comparison) >= (1.0 if own else 2.0)

    return [c for c in every_pair(scored) if is_clear(c)]


def adjusted(
    scored: Scored, *, truncated: Literal["keep", "drop", "lose"] = "keep", length_penalty: float = 0.0
) -> Scored:
    """The group with `length_penalty` a token off its rewards, and with truncated completions as they are
    (`keep`), without a reward (`drop`), or below all others, also for a judge (`lose`).
    """
    rewards = [
        None if r is None else r - length_penalty * n
        for r, n in zip(scored.rewards, scored.tokens, strict=True)
    ]
    cut = [i for i, is_cut in enumerate(scored.truncated) if is_cut]
    duels = dict(scored.duels)
    if truncated != "keep":
        for i in cut:
            rewards[i] = None if truncated == "drop" or rewards[i] is None else -math.inf
    if truncated == "lose":
        ended = [i for i in range(len(rewards)) if i not in cut]
        for i, j in [(i, j) for i in ended for j in cut]:
            duels.pop((j, i), None)
            duels[i, j] = 1.0
    return replace(scored, rewards=rewards, duels=duels)


def win_rates(scored: Scored) -> list[float | None]:
    """The mean of P(a completion beats another) over those of other sources, or over all others where there
    is one source. P is a duel's, else the sigmoid of the difference of rewards; None: no P is known.
    """
    return [_win_rate(scored, i) for i in range(len(scored.rewards))]


def _win_rate(scored: Scored, i: int) -> float | None:
    others = [j for j in range(len(scored.rewards)) if j != i]
    foreign = [j for j in others if scored.sources[j] != scored.sources[i]]
    known = [p for j in foreign or others if (p := _probability(scored, i, j)) is not None]
    return sum(known) / len(known) if known else None


def _probability(scored: Scored, i: int, j: int) -> float | None:
    """P(i is better than j), where a judge or rewards say so."""
    judged = by_preference(scored, Comparison(i, j))
    if judged is not None:
        return judged.probability if judged.better == i else 1.0 - judged.probability
    if scored.rewards[i] is None or scored.rewards[j] is None:
        return None
    if scored.rewards[i] == scored.rewards[j]:
        return 0.5
    rated = by_reward(scored, Comparison(i, j))
    return rated.probability if rated.better == i else 1.0 - rated.probability


def hard(scored: Scored, comparison: Comparison) -> Comparison:
    """The probability that the rule gave: 1 for the rules of this file."""
    return comparison


def by_reward(scored: Scored, comparison: Comparison) -> Comparison:
    """P = sigmoid(reward of the better one - reward of the other): Bradley-Terry with the rewards given."""
    assert comparison.other is not None
    gap = _reward(scored, comparison.better) - _reward(scored, comparison.other)
    return _oriented(comparison.better, comparison.other, 1.0 / (1.0 + math.exp(-max(gap, -700.0))))


def by_preference(scored: Scored, comparison: Comparison) -> Comparison | None:
    """P from the duels, whichever way round they are; the mean where both are known."""
    assert comparison.other is not None
    i, j = comparison.better, comparison.other
    known = [p for p in (scored.duels.get((i, j)), _complement(scored.duels.get((j, i)))) if p is not None]
    return _oriented(i, j, sum(known) / len(known)) if known else None


def compare_group(
    scored: Scored, *, rule: Rule = best_worst, label: Label = hard, min_gap: float = 0.0
) -> list[Comparison]:
    """The comparisons of a group, with the probabilities of `label`.

    Left out: those whose rewards differ by less than `min_gap` and those whose probability is not known. A
    group of one completion is a single label, whose probability is its reward; ValueError when that is
    outside 0 to 1.
    """
    if len(scored.rewards) == 1:
        return _single(scored.rewards[0])
    labelled = (label(scored, c) for c in rule(scored) if _gap(scored, c) >= min_gap)
    return [c for c in labelled if c is not None]


RULES: dict[str, Rule] = {
    "best_worst": best_worst,
    "best_second": best_second,
    "best_random": best_random,
    "first_two": first_two,
    "all": every_pair,
    "of_data": of_data,
    "dno_prct": dno_prct,
}
LABELS: dict[str, Label] = {"hard": hard, "reward": by_reward, "preference": by_preference}


def _single(reward: float | None) -> list[Comparison]:
    if reward is None:
        return []
    if not 0.0 <= reward <= 1.0:
        raise ValueError(
            "a group of one completion is a single label: its reward is the probability that it is good, "
            f"from 0 to 1, got {reward}; to compare completions, let a group have two or more"
        )
    return [Comparison(0, None, reward)]


def _by_reward(scored: Scored) -> list[int]:
    """Completions that have a reward, the best first; equals in their order."""
    known = [i for i, reward in enumerate(scored.rewards) if reward is not None]
    return sorted(known, key=lambda i: -_reward(scored, i))


def _reward(scored: Scored, i: int) -> float:
    reward = scored.rewards[i]
    assert reward is not None
    return reward


def _over(scored: Scored, i: int, j: int) -> list[Comparison]:
    """The one of `i` and `j` with the higher reward over the other; nothing where they are equal."""
    a, b = _reward(scored, i), _reward(scored, j)
    return [] if a == b else [Comparison(i, j) if a > b else Comparison(j, i)]


def _gap(scored: Scored, comparison: Comparison) -> float:
    if comparison.other is None:
        return math.inf
    return abs(_reward(scored, comparison.better) - _reward(scored, comparison.other))


def _complement(probability: float | None) -> float | None:
    return None if probability is None else 1.0 - probability


def _oriented(i: int, j: int, probability: float) -> Comparison:
    comparison = Comparison(i, j, probability)
    return (
        comparison
        if probability >= 0.5
        else replace(comparison, better=j, other=i, probability=1 - probability)
    )
