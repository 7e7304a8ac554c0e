"""Reward functions as users write them, good and bad."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np


class Dictionary:
    """A class that reads a file when it is constructed."""

    def __init__(self, words: str) -> None:
        self.words = Path(words).read_text().split()

    def __call__(self, completions: list[str]) -> list[float]:
        return [float(text in self.words) for text in completions]


def brevity(completions: list[str], limit: int = 5) -> list[float]:
    return [float(len(text) <= limit) for text in completions]


def trl_accuracy(
    completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any
) -> list[float | None]:
    """A reward like the examples of TRL: chat completions, one column, and everything else in kwargs."""
    assert {"prompts", "completion_ids", "trainer_state", "level"} <= kwargs.keys()
    contents = [completion[0]["content"] for completion in completions]
    return [float(a == b) if b else None for a, b in zip(contents, solution, strict=True)]


def everything(seen: str, **kwargs: Any) -> list[float]:
    """Writes its arguments to the file `seen`."""
    kwargs["trainer_state"] = vars(kwargs["trainer_state"])
    assert callable(kwargs.pop("log_extra")) and callable(kwargs.pop("log_metric"))
    Path(seen).write_text(json.dumps(kwargs))
    return [0.0] * len(kwargs["completions"])


async def slow(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [1.0] * len(completions)


def two_objectives(completions: list[str]) -> list[dict[str, float | None]]:
    return [{"length": float(len(text)), "polite": 1.0 if "please" in text else None} for text in completions]


def numpy_scores(completions: list[str]) -> np.ndarray[Any, Any]:
    return np.arange(len(completions), dtype=np.float32)


def only_questions(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [2.0 if prompt.endswith("?") else None for prompt in prompts]


def never_applies(completions: list[str]) -> list[None]:
    return [None] * len(completions)


def nan_when_empty(completions: list[str]) -> list[float]:
    return [1.0 if text else math.nan for text in completions]


def broken(completions: list[str]) -> list[float]:
    return [1.0 / 0 for _ in completions]


def one_short(completions: list[str]) -> list[float]:
    return [0.0] * (len(completions) - 1)


def words(completions: list[str]) -> list[str]:
    return ["good" for _ in completions]


def one_number(completions: list[str]) -> float:
    return 1.0


def step(completions: list[str], trainer_state: Any) -> list[float]:
    return [float(trainer_state.global_step)] * len(completions)


def noted(completions: list[str], answer: list[Any], file: str) -> list[float]:
    """Appends the completions that it is called with to `file`; fails on an empty completion."""
    with Path(file).open("a") as calls:
        for text, value in zip(completions, answer, strict=True):
            calls.write(f"{text}/{value}\n" if text else "\n")
    return [float(len(text)) if text else math.nan for text in completions]


not_a_function = 3
