"""The verdict on a run: whether held-out figures rose, by a 95% interval, and its warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from rlhf.monitoring.health import HealthWatch, pairs_are_given
from rlhf.monitoring.records import Headline, headlines

ENOUGH_PROMPTS = 30
"""Held-out prompts or pairs below which the normal intervals are too rough for a verdict."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether held-out figures rose, as sentences, and the health warnings as reasons.

    `outcome` is that of the first figure: of samples, if any were made, else of preference pairs.
    """

    outcome: Literal["rose", "fell", "unchanged", "unknown"]
    sentence: str
    reasons: tuple[str, ...] = ()


def difference(
    before: tuple[float, float, float], after: tuple[float, float, float]
) -> tuple[float, float, float]:
    """How much a figure changed, with the bounds of its 95% interval; the arguments are figures with bounds.

    With p1 in [l1, u1] before and p2 in [l2, u2] after, d = p2 - p1 lies in
    [d - sqrt((p2 - l2)^2 + (u1 - p1)^2), d + sqrt((u2 - p2)^2 + (p1 - l1)^2)]: Newcombe, Statistics in
    Medicine 17 (1998), method 10. It treats the two evaluations as independent; for the same prompts the
    interval is therefore wider than necessary.
    """
    (p1, l1, u1), (p2, l2, u2) = before, after
    change = p2 - p1
    return change, change - math.hypot(p2 - l2, u1 - p1), change + math.hypot(u2 - p2, p1 - l1)


def verdict(evaluations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, float]]) -> Verdict:
    """Compares the first and the last evaluation.

    A figure "rose" or "fell" only if the 95% interval of the difference excludes 0. That a run learned is
    said of the accuracy of samples alone, and only on at least `ENOUGH_PROMPTS` held-out prompts: a policy
    may order pairs better and still write worse completions.
    """
    watch = HealthWatch()
    reasons = tuple(text for values in steps for text in watch.check(values))
    reasons += tuple(text for record in evaluations for text in watch.evaluated(record))
    found = [
        _judge(figure, before, evaluations[-1])
        for figure in headlines(evaluations)
        for before in evaluations[:-1][:1]
        if figure.is_in(before) and figure.is_in(evaluations[-1])
    ]
    if not found:
        return Verdict("unknown", _by_training(evaluations, steps), reasons)
    return Verdict(found[0].outcome, " ".join(said.sentence for said in found), reasons)


def _judge(shown: Headline, before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    """What is said of one figure."""
    change, low, high = difference(shown.of(before), shown.of(after))
    course = f"from {shown.of(before)[0]:.2f} to {shown.of(after)[0]:.2f}"
    interval = f"({change:+.2f}, 95% interval {low:+.2f} to {high:+.2f})"
    if shown.of_pairs:
        count, items = after["pairs"]["num_pairs"], "held-out pairs"
        interval = f"{interval[:-1]}, {count} pairs)"
    else:
        count, items = after.get("num_prompts", ENOUGH_PROMPTS), "held-out prompts"
    if count < ENOUGH_PROMPTS:
        few = f"{count} {items} are too few for a verdict; take {ENOUGH_PROMPTS} or more"
        return Verdict("unknown", f"Held-out {shown.word} went {course} {interval}: {few}.")
    outcome = "rose" if low > 0 else "fell" if high < 0 else "unchanged"
    if outcome == "unchanged":
        chance = f"{shown.word} went {course}, and the difference may be chance {interval}"
        learned = "It did not learn measurably: held-out" if shown.word == "accuracy" else "Held-out"
        return Verdict(outcome, f"{learned} {chance}.")
    if shown.word != "accuracy":
        return Verdict(outcome, f"Held-out {shown.word} {outcome} {course} {interval}.")
    learned = "It learned" if outcome == "rose" else "It got worse"
    return Verdict(outcome, f"{learned}: held-out accuracy {outcome} {course} {interval}.")


def _by_training(evaluations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, float]]) -> str:
    made = "No evaluation was made" if not evaluations else "Only one evaluation was made"
    given = any(map(pairs_are_given, steps))
    name, what = ("pairs/accuracy", "pair accuracy") if given else ("reward/mean", "reward")
    rewards = [values[name] for values in steps if name in values]
    if len(rewards) < 2:
        return f"{made}: whether it learned is not known."
    part = max(1, len(rewards) // 5)
    first, last = fmean(rewards[:part]), fmean(rewards[-part:])
    return (
        f"{made}: whether it learned is not known. The {what} in training went from {first:.3f} to "
        f"{last:.3f} (means of the first and the last {part} of {len(rewards)} steps)."
    )
