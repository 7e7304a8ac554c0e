"""Two rewards: a function that returns one number per completion, and a class with several objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def close(
    completions: Sequence[Any], answer: Sequence[int | None], scale: float = 5.0, **_: Any
) -> list[float | None]:
    """1 for the correct number, less the further off the number is, 0 without a number.

    `answer` is a column of the dataset, `scale` a parameter from the config. `**_` takes the columns that the
    function does not name. It returns None ("does not apply") where the row has no answer: the sample then
    gets its reward from the other functions.
    """
    return [
        None if correct is None else _nearness(_number(completion), correct, scale)
        for completion, correct in zip(completions, answer, strict=True)
    ]


class Terse:
    """One object is made in each worker, so whatever its constructor loads is loaded once."""

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[dict[str, float]]:
        """Several objectives: each appears as `reward/<name>` and may have its own weight in the config."""
        return [
            {"short": float(len(_text(c)) <= self.limit), "plain": float(_text(c).isalnum())}
            for c in completions
        ]


def _text(completion: Any) -> str:
    """The completion of a chat prompt is a list of messages, that of a plain prompt is text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _number(completion: Any) -> int | None:
    digits = "".join(c for c in _text(completion) if c.isdigit())
    return int(digits[-6:]) if digits else None


def _nearness(said: int | None, correct: int, scale: float) -> float:
    return 0.0 if said is None else 1.0 / (1.0 + abs(said - correct) / scale)
