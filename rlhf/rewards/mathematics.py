r"""Reward `math_match`: mathematical equality, by the package math-verify (extra `rewards`).

For example 1/2, 0.5 and \frac{1}{2} are equal. Where the answer is looked for, and what is a plain number, is
decided as for `numeric_match` (rlhf/rewards/numbers.py): math-verify reads 1e5 as 1, and 12:30 as 12. So two
numbers are compared here, and math-verify compares all else.

The time limits of the package are alarm signals, which work
only in the main thread; workers call reward functions there. An alarm interrupts sympy, but not a single
endless step of C code: such a step is ended by the deadline of the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rlhf.rewards.builtin import Completion, completion_text
from rlhf.rewards.numbers import Answer, answer_part, final_answer

SECONDS = 3
CLOSE = Fraction(1, 10**6)
"""Relative difference up to which two numbers are equal if neither is whole: 0.3333333 is 1/3."""


def math_match(
    completions: Sequence[Completion], answer: Sequence[Any], seconds: int = SECONDS
) -> list[float]:
    """1 where the completion's final expression equals `answer`, else 0; also 0 when it takes too long.

    The final expression is in the part of the completion that `answer_part` finds, of which it is the last
    one. It may be any expression of the same value: `0 + 2` equals 2. `answer` may be LaTeX, with or without
    dollar signs, or plain text. `seconds` limits parsing one text, and comparing once.

    Raises ValueError for an answer that holds no expression.
    """
    import math_verify  # pyright: ignore[reportMissingTypeStubs]

    library: Any = math_verify

    # the package logs each expired time limit as an error with a traceback
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    scores: list[float] = []
    for completion, value in zip(completions, answer, strict=True):
        text, marked = answer_part(completion_text(completion))
        number = final_answer(completion_text(completion))
        decided = _as_numbers(value, number)
        # the order matters: gold before completion, so that "x = 3" in the completion can equal the answer 3
        gold = _gold(value, library.parse, seconds)
        if decided is None:
            # math-verify takes the second factor alone for the product
            text = text.replace("\u00d7", "*").replace("\u00f7", "/")
            found = library.parse(f"\\boxed{{{text}}}" if marked else text, parsing_timeout=seconds)
            cut_out = number is None and _is_number(found)
            decided = not cut_out and library.verify(gold, found, timeout_seconds=seconds)
        scores.append(float(decided))
    return scores


def _as_numbers(value: Any, found: Answer | None) -> bool | None:
    """Whether a completion's number is the number `value`; None where either is not a number."""
    gold = final_answer(str(value))
    if gold is None or found is None:
        return None
    if gold.equals(found) or _is_close(gold, found):
        return True
    # math-verify knows that a set has no order
    return None if gold.kind == found.kind == "list" else False


def _is_number(found: Sequence[Any]) -> bool:
    """Whether what math-verify read is a number. In a text that gives none it is a part of `2x` or `40 +`."""
    read = found[-1] if found else None
    return isinstance(read, str) and final_answer(read) is not None


def _is_close(gold: Answer, found: Answer) -> bool:
    a, b = gold.values[0], found.values[0]
    whole = a.denominator == 1 or b.denominator == 1
    return gold.kind == found.kind == "one" and not whole and abs(a - b) <= CLOSE * abs(a)


def _gold(value: Any, parse: Any, seconds: int) -> list[Any]:
    text = "" if value is None else str(value)
    written = text if "$" in text or "\\boxed" in text else f"${text}$"
    gold = parse(written, parsing_timeout=seconds) or parse(text, parsing_timeout=seconds)
    if not gold:
        raise ValueError(f"math_match needs an expression in the column 'answer', got {value!r:.200}")
    return gold
