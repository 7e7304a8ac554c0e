"""Reward `math_match`: mathematical equality, by the package math-verify (extra `rewards`).

For example 1/2, 0.5 and \\frac{1}{2} are equal. The time limits of the package are alarm signals, which work
only in the main thread; workers call reward functions there. An alarm interrupts sympy, but not a single
endless step of C code: such a step is ended by the deadline of the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rlhf.rewards.builtin import Completion, completion_text

SECONDS = 3


def math_match(
    completions: Sequence[Completion], answer: Sequence[Any], seconds: int = SECONDS
) -> list[float]:
    """1 where the completion's final expression equals `answer`, else 0; also 0 when it takes too long.

    The final expression of a completion is the boxed one, or the last one if none is boxed. `answer` may be
    LaTeX, with or without dollar signs, or plain text. `seconds` limits parsing one text, and comparing once.

    Raises ValueError for an answer that holds no expression.
    """
    import math_verify  # pyright: ignore[reportMissingTypeStubs]

    library: Any = math_verify

    # the package logs each expired time limit as an error with a traceback
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    scores: list[float] = []
    for completion, value in zip(completions, answer, strict=True):
        gold = _gold(str(value), library.parse, seconds)
        # the order matters: gold before completion, so that "x = 3" in the completion can equal the answer 3
        found = library.parse(completion_text(completion), parsing_timeout=seconds)
        scores.append(float(library.verify(gold, found, timeout_seconds=seconds)))
    return scores


def _gold(text: str, parse: Any, seconds: int) -> list[Any]:
    written = text if "$" in text or "\\boxed" in text else f"${text}$"
    gold = parse(written, parsing_timeout=seconds) or parse(text, parsing_timeout=seconds)
    if not gold:
        raise ValueError(f"math_match needs an expression in the column 'answer', got {text!r:.200}")
    return gold
