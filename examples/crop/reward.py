"""The rewards of AdaptVision (arXiv:2512.03794, equations 6 to 10) for episodes of `Crop`; batch: group.

Outcome: `right` (1 or 0) and `balance`. Of the tool: `inside` and `area`, the `tool_objectives` of `dtpo`.
What differs: 1. `right` compares with the answer, in place of a judge; 2. `inside` compares with the column
`subject`, the box that has to be seen, in place of GPT-4o; 3. there is no reward for a format, which the tool
itself checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

THETA, PENALTY = 0.2, 0.1
Episode = Sequence[Mapping[str, Any]]


def right(completions: Sequence[Episode], answer: Sequence[str], **_: Any) -> list[float]:
    """Whether the last message has the answer."""
    said = [str(messages[-1]["content"]).lower() for messages in completions]
    return [float(wanted.lower() in text) for text, wanted in zip(said, answer, strict=True)]


def balance(
    completions: Sequence[Episode], answer: Sequence[str], environments: Sequence[Any], **_: Any
) -> list[float]:
    """-0.1 for a right answer with the tool, and for one without it while these are fewer than a fifth of the
    group's right answers (but not none)."""
    correct = right(completions, answer)
    with_tool = [e.box is not None for e in environments]
    direct = sum(c and not t for c, t in zip(correct, with_tool, strict=True))
    share = direct / max(1.0, sum(correct))
    few = 0 < share < THETA
    return [-PENALTY * bool(c and (t or few)) for c, t in zip(correct, with_tool, strict=True)]


def inside(environments: Sequence[Any], subject: Sequence[Sequence[float]], **_: Any) -> list[float]:
    """1 if the part that was shown has the subject in it, else 0."""
    return [float(_holds(e.box, box)) for e, box in zip(environments, subject, strict=True)]


def area(
    completions: Sequence[Episode],
    answer: Sequence[str],
    environments: Sequence[Any],
    subject: Sequence[Sequence[float]],
    **_: Any,
) -> list[float]:
    """clip(a / mean - 1, 0, 1), a the share of the picture that was shown, over the right answers of the
    group whose part has the subject in it; 0 for all others. Its weight is negative."""
    correct, seen = right(completions, answer), inside(environments, subject)
    shown = [_area(e.box) if c and s else 0.0 for c, s, e in zip(correct, seen, environments, strict=True)]
    counted = [a for a in shown if a]
    mean = sum(counted) / len(counted) if counted else 1.0
    return [min(1.0, max(0.0, a / mean - 1.0)) for a in shown]


def _holds(outer: Sequence[float] | None, inner: Sequence[float]) -> bool:
    if outer is None:
        return False
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
