"""Two rewards: a number a completion, and several objectives at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def close(
    completions: Sequence[Any], answer: Sequence[int | None], scale: float = 5.0, **_: Any
) -> list[float | None]:
    """1 for the right number, less the further off it is, 0 without one; None where the row has no answer.

    `answer` is a column of the dataset, `scale` a parameter of the config. What a function does not name
    comes in `**_`. None means "does not apply": the sample gets its reward from the other functions, or none.
    """
    return [
        None if right is None else _nearness(_number(completion), right, scale)
        for completion, right in zip(completions, answer, strict=True)
    ]


class Terse:
    """A class is made once in each worker, so what it loads is loaded once."""

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[dict[str, float]]:
        """Several objectives: each appears as `reward/<name>`, with a weight of its own if given one."""
        return [
            {"short": float(len(_text(c)) <= self.limit), "plain": float(_text(c).isalnum())}
            for c in completions
        ]


def _text(completion: Any) -> str:
    """A chat prompt has a list of messages as completion, a plain prompt has text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _number(completion: Any) -> int | None:
    digits = "".join(c for c in _text(completion) if c.isdigit())
    return int(digits[-6:]) if digits else None


def _nearness(said: int | None, right: int, scale: float) -> float:
    return 0.0 if said is None else 1.0 / (1.0 + abs(said - right) / scale)
