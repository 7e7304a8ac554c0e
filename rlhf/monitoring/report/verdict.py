"""The verdict on a run: whether held-out accuracy or reward rose, by a 95% interval, and its warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from rlhf.monitoring.health import HealthWatch
from rlhf.monitoring.records import headline

ENOUGH_PROMPTS = 30
"""Held-out prompts below which the normal intervals are too rough for a verdict."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether held-out accuracy or reward rose, as a sentence, and the health warnings as reasons."""

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
    said of an accuracy alone, and only on at least `ENOUGH_PROMPTS` held-out prompts.
    """
    watch = HealthWatch()
    reasons = tuple(text for values in steps for text in watch.check(values))
    if len(evaluations) < 2:
        return Verdict("unknown", _by_training_reward(evaluations, steps), reasons)
    shown, before, after = headline(evaluations), evaluations[0], evaluations[-1]
    change, low, high = difference(shown.of(before), shown.of(after))
    course = f"from {shown.of(before)[0]:.2f} to {shown.of(after)[0]:.2f}"
    interval = f"({change:+.2f}, 95% interval {low:+.2f} to {high:+.2f})"
    prompts = after.get("num_prompts", ENOUGH_PROMPTS)
    outcome = "rose" if low > 0 else "fell" if high < 0 else "unchanged"
    if prompts < ENOUGH_PROMPTS:
        few = f"{prompts} held-out prompts are too few for a verdict; take {ENOUGH_PROMPTS} or more"
        return Verdict("unknown", f"Held-out {shown.word} went {course} {interval}: {few}.", reasons)
    if outcome == "unchanged":
        chance = f"{shown.word} went {course}, and the difference may be chance {interval}"
        learned = "It did not learn measurably: held-out" if shown.word == "accuracy" else "Held-out"
        return Verdict(outcome, f"{learned} {chance}.", reasons)
    sentence = f"Held-out reward {outcome} {course} {interval}."
    if shown.word == "accuracy":
        learned = "It learned" if outcome == "rose" else "It got worse"
        sentence = f"{learned}: held-out accuracy {outcome} {course} {interval}."
    return Verdict(outcome, sentence, reasons)


def _by_training_reward(
    evaluations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, float]]
) -> str:
    made = "No evaluation was made" if not evaluations else "Only one evaluation was made"
    rewards = [values["reward/mean"] for values in steps if "reward/mean" in values]
    if len(rewards) < 2:
        return f"{made}: whether it learned is not known."
    part = max(1, len(rewards) // 5)
    first, last = fmean(rewards[:part]), fmean(rewards[-part:])
    return (
        f"{made}: whether it learned is not known. The reward in training went from {first:.3f} to "
        f"{last:.3f} (means of the first and the last {part} of {len(rewards)} steps)."
    )
