"""What the words of the small cropper ask for, and what is counted of its episodes.

Apart from benchmarks/small_cropper.py, so that the processes of tools and rewards import neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BOXES = {
    "topleft": (0.0, 0.0, 0.5, 0.5),
    "topright": (0.5, 0.0, 1.0, 0.5),
    "bottomleft": (0.0, 0.5, 0.5, 1.0),
    "bottomright": (0.5, 0.5, 1.0, 1.0),
    "all": (0.0, 0.0, 1.0, 1.0),
}
"""Edges of the part of the picture that a word stands for: left, upper, right, lower."""
KINDS = ("readable", "hidden")
"""Of questions: the answer can be read in the small picture, or only in the large one."""
Episode = Sequence[Mapping[str, Any]]


def calls(text: str) -> list[dict[str, Any]]:
    """The call in a turn `crop WORD` (`environment.calls`); any other turn has none."""
    words = text.split()
    if len(words) != 2 or words[0] != "crop" or words[1] not in BOXES:
        return []
    return [{"name": "crop", "arguments": dict(zip(("x1", "y1", "x2", "y2"), BOXES[words[1]], strict=True))}]


def seen(
    completions: Sequence[Episode],
    answer: Sequence[str],
    kind: Sequence[str],
    environments: Sequence[Any],
    **_: Any,
) -> list[dict[str, float]]:
    """A reward function of weight 0: whether the tool was called and whether the answer is right, by kind."""
    rows = zip(completions, answer, kind, environments, strict=True)
    return [
        {f"tool_{k}": float(e.box is not None), f"right_{k}": float(wanted in str(m[-1]["content"]))}
        for m, wanted, k, e in rows
    ]
