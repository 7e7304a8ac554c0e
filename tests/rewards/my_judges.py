"""Judges of pairs that the tests use: tiny, deterministic, and some that misbehave."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

P = {("a", "b"): 0.7778, ("b", "a"): 0.4}


def looked_up(completions: Any) -> list[float]:
    """P(a, b) = .7778 and P(b, a) = .4."""
    return [P[a, b] for a, b in completions]


def longer(completions: Any) -> list[int]:
    """The index of the longer one, as TRL's judges answer."""
    return [int(len(b) > len(a)) for a, b in completions]


def more_a(completions: Any) -> list[float]:
    """The share of letters a is what counts."""
    share = [[text.count("a") / max(1, len(text)) for text in pair] for pair in completions]
    return [0.5 if a == b else float(a > b) for a, b in share]


def first(completions: Any) -> list[float]:
    return [0.9 for _ in completions]


def says(completions: Any, answers: Any) -> Any:
    """Whatever the settings say."""
    return [answers.get(f"{a}{b}") for a, b in completions]


def refuses(completions: Any) -> Any:
    return [True for _ in completions]


def misbehaves(completions: Any, how: str) -> list[float]:
    """On a pair with an x; else the longer one is better."""
    for pair in completions:
        if "x" in "".join(pair):
            if how == "hangs":
                time.sleep(60)
            if how == "crashes":
                os._exit(3)
            if how == "raises":
                raise RuntimeError("no idea")
            return [float("nan")]
    return [1.0 - i for i in longer(completions)]


def seen(prompts: Any, completions: Any, completion_ids: Any, answer: Any, trainer_state: Any) -> list[float]:
    sys.stdout.write(f"{prompts} {completions} {completion_ids} {answer} {trainer_state.global_step}\n")
    return [1.0 for _ in prompts]


def sold_more(completions: Any, environments: Any) -> list[float]:
    """Of two episodes the one whose environment sold more; prints what it sees of the first pair."""
    roles = [[message["role"] for message in messages] for messages in completions[0]]
    sys.stdout.write(f"{roles} {[e.sold for e in environments[0]]}\n")
    return [0.5 if a.sold == b.sold else float(a.sold > b.sold) for a, b in environments]


async def later(completions: Any) -> list[float]:
    return [0.25 for _ in completions]


class OfTRL:
    """With the method and the arguments of TRL's pairwise judges."""

    def judge(self, prompts: Any, completions: Any, shuffle_order: bool = True) -> list[int]:
        assert not shuffle_order
        assert all(isinstance(text, str) for text in (*prompts, *(c for pair in completions for c in pair)))
        return [
            int("good" in b) if "user: " in p else -1 for p, (_, b) in zip(prompts, completions, strict=True)
        ]
