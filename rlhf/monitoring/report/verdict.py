"""The verdict on a run: whether accuracy rose, by a 95% interval, and the warnings of its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from rlhf.monitoring.health import HealthWatch


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether accuracy rose, as a sentence, and the health warnings of the run's metrics as reasons."""

    outcome: Literal["rose", "fell", "unchanged", "unknown"]
    sentence: str
    reasons: tuple[str, ...] = ()


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float, float]:
    """How much the accuracy changed, and the bounds of its 95% interval.

    With p1 in [l1, u1] before and p2 in [l2, u2] after, d = p2 - p1 lies in
    [d - sqrt((p2 - l2)^2 + (u1 - p1)^2), d + sqrt((u2 - p2)^2 + (p1 - l1)^2)]: Newcombe, Statistics in
    Medicine 17 (1998), method 10. It treats the two evaluations as independent; for the same prompts the
    interval is therefore wider than necessary.
    """
    p1, l1, u1 = before["accuracy"], before["ci_low"], before["ci_high"]
    p2, l2, u2 = after["accuracy"], after["ci_low"], after["ci_high"]
    change = p2 - p1
    return change, change - math.hypot(p2 - l2, u1 - p1), change + math.hypot(u2 - p2, p1 - l1)


def verdict(evaluations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, float]]) -> Verdict:
    """Compares the first and the last evaluation.

    Accuracy "rose" or "fell" only if the 95% interval of the difference excludes 0.
    """
    watch = HealthWatch()
    reasons = tuple(text for values in steps for text in watch.check(values))
    if len(evaluations) < 2:
        return Verdict("unknown", _by_training_reward(evaluations, steps), reasons)
    before, after = evaluations[0], evaluations[-1]
    change, low, high = difference(before, after)
    course = f"from {before['accuracy']:.2f} to {after['accuracy']:.2f}"
    interval = f"{change:+.2f}, 95% interval {low:+.2f} to {high:+.2f}"
    if low > 0:
        return Verdict("rose", f"It learned: accuracy rose {course} ({interval}).", reasons)
    if high < 0:
        return Verdict("fell", f"It got worse: accuracy fell {course} ({interval}).", reasons)
    sentence = (
        f"It did not learn measurably: accuracy went {course}, and the difference may be chance ({interval})."
    )
    return Verdict("unchanged", sentence, reasons)


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
