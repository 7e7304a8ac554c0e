"""Mathematical equality by the package math-verify (extra `rewards`): 1/2 is 0.5 is \\frac{1}{2}.

Its time limits are alarms, which work in the main thread only; a worker calls rewards there. They end what
sympy computes, and not one endless step of C code: that is what the worker's deadline is for.
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
    """1 where the completion's final expression equals `answer`, else 0; 0 too when it takes too long.

    Of a completion the boxed expression counts, or the last one. `answer` may be LaTeX, with or without
    dollar signs, or plain. `seconds`: for reading a text, and for comparing.

    Raises ValueError for an answer in which there is nothing to compare with.
    """
    import math_verify  # pyright: ignore[reportMissingTypeStubs]

    library: Any = math_verify

    # it logs each time limit as an error, with a traceback
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    scores: list[float] = []
    for completion, value in zip(completions, answer, strict=True):
        gold = _gold(str(value), library.parse, seconds)
        # the order matters: a relation in the completion may be compared with a number, not the reverse
        said = library.parse(completion_text(completion), parsing_timeout=seconds)
        scores.append(float(library.verify(gold, said, timeout_seconds=seconds)))
    return scores


def _gold(text: str, parse: Any, seconds: int) -> list[Any]:
    written = text if "$" in text or "\\boxed" in text else f"${text}$"
    gold = parse(written, parsing_timeout=seconds) or parse(text, parsing_timeout=seconds)
    if not gold:
        raise ValueError(f"math_match needs an expression in the column 'answer', got {text!r:.200}")
    return gold
