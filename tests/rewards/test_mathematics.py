"""The reward `math_match`, called directly and in a worker."""

from __future__ import annotations

import pytest

from rlhf.rewards.mathematics import math_match
from tests.rewards.answers import rows
from tests.rewards.test_hostile import given, made_of, submit


@pytest.mark.parametrize(
    ("completion", "answer", "equal"),
    [
        ("The answer is $\\frac{1}{2}$.", "0.5", 1.0),
        ("so x = \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
        ("First 3, then 4. \\boxed{7}", 7, 1.0),
        ("It is 1,234", "1234", 1.0),
        ("$2\\sqrt{2}$", "$\\sqrt{8}$", 1.0),
        ("$(x+1)^2$", "$x^2+2x+1$", 1.0),
        ("$\\{1, 2\\}$", "$\\{2, 1\\}$", 1.0),
        ("It is 8", "9", 0.0),
        ("no number at all", "9", 0.0),
        ("", "9", 0.0),
    ],
)
def test_expressions_are_equal_by_value(completion: str, answer: object, equal: float) -> None:
    assert math_match([completion], [answer]) == [equal]


@pytest.mark.parametrize(("completion", "answer", "score", "equal"), rows())
def test_plain_numbers_are_read_as_numeric_match_reads_them(
    completion: str, answer: str, score: float | None, equal: float
) -> None:
    """`score` is of numeric_match: a completion that it counts as right is right here too."""
    assert math_match([completion], [answer]) == [equal]
    assert equal >= (score or 0.0)


def test_a_tower_of_powers_ends_with_its_worker_or_counts_as_wrong() -> None:
    """The tower takes longer than the time limit; the other samples are scored."""
    with made_of("math_match", ("answer",), params={"seconds": 1}, timeout=20.0, memory_gib=2.0) as rewards:
        scoring = submit(rewards, ["$9^{9^{9^9}}$", "$7$"], answer=7)
        assert given(scoring)[1] == 1.0
        assert given(scoring)[0] in (None, 0.0)


def test_an_answer_that_is_no_expression_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an expression in the column 'answer', got None"):
        math_match(["None"], [None])
    with pytest.raises(ValueError, match="needs an expression in the column 'answer', got ''"):
        math_match(["7"], [""])
