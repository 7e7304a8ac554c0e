"""The built-in rewards by hand, and what a number is by law."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rewards.builtin import exact_match, format_match, last_number, numeric_match


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8", "8"),
        ("3 + 5 = 8.", "8"),
        ("The answer is 8.0!", "8.0"),
        ("**-12**", "-12"),
        ("x = \u221212", "-12"),
        ("10-5", "5"),
        ("(2)-5", "5"),
        ("about $1,234,567.89", "1234567.89"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        (".5 litres", ".5"),
        ("007", "7"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=2), words=st.text("abc= "))
def test_a_number_is_found_however_it_is_written(value: Decimal, words: str) -> None:
    for written in (f"{value:f}", f"{value:,f}"):
        assert last_number(f"{words} {written}. {words}") == value


def test_numbers_match_by_value_and_not_by_spelling() -> None:
    completions = ["It is 8.", "It is 9.", "1,000", "0.10", "-4", "nothing"]
    assert numeric_match(completions, [8, 8, "1000", 0.1, "#### -4", 3]) == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]


def test_only_the_last_message_counts() -> None:
    chat = [[{"role": "assistant", "content": "8"}, {"role": "assistant", "content": "9"}]]
    assert numeric_match(chat, [9]) == [1.0]
    assert exact_match(chat, ["9"]) == [1.0]


def test_an_answer_without_number_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a number in the column 'answer', got 'eight'"):
        numeric_match(["8"], ["eight"])


def test_an_exact_match_forgives_white_space_only() -> None:
    assert exact_match([" Paris\n", "paris", "Paris."], ["Paris"] * 3) == [1.0, 0.0, 0.0]


def test_a_format_is_a_regular_expression_of_the_whole_completion() -> None:
    assert format_match(["a\n7", "a 7 b"], pattern=r"a.\d") == [1.0, 0.0]


def test_tags_stand_once_each_in_order_with_nothing_outside() -> None:
    good = "<think>3 and\n5</think>\n<answer>8</answer>\n"
    bad = [
        "<answer>8</answer><think>3</think>",
        "<think>3</think><answer>8",
        f"{good}so 8",
        f"{good}<answer>9</answer>",
        "<think>3<think>4</think></think><answer>8</answer>",
    ]
    assert format_match([good, *bad], pattern=["think", "answer"]) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
