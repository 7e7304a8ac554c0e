"""The built-in rewards: scores worked out by hand, and properties of how numbers are found."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rewards.builtin import (
    exact_match,
    format_match,
    json_match,
    length,
    numeric_match,
    overlong,
)
from tests.rewards.answers import rows

ROWS = rows()


def test_the_table_has_a_row_for_each_rule() -> None:
    assert len(ROWS) > 200
    assert len({(completion, answer) for completion, answer, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("completion", "answer", "score", "equal"), ROWS)
def test_what_counts_as_the_answer(completion: str, answer: str, score: float | None, equal: float) -> None:
    if score is None:
        with pytest.raises(ValueError, match="needs a number in the column 'answer'"):
            numeric_match([completion], [answer])
    else:
        assert numeric_match([completion], [answer]) == [score]


@given(
    value=st.decimals(allow_nan=False, allow_infinity=False, places=2),
    words=st.sampled_from(["", "is", "\n", "x =", "about"]),
)
def test_a_number_is_found_however_it_is_written(value: Decimal, words: str) -> None:
    for written in (f"{value:f}", f"{value:,f}"):
        assert numeric_match([f"so {words} {written}. It is so."], [value]) == [1.0]


@given(st.text("0123456789+-*/^.,:% ()x\\{}$e#\n", max_size=40))
def test_any_text_is_read_without_an_error(text: str) -> None:
    assert numeric_match([text], [1]) in ([0.0], [1.0])


@pytest.mark.parametrize("text", ["1" * 10_000, "-" * 10_000, "1 " * 10_000, "9^9" * 5_000, "\\frac" * 5_000])
def test_long_nonsense_is_no_answer_and_no_error(text: str) -> None:
    assert numeric_match([text], [7]) == [0.0]


@pytest.mark.parametrize("answer", [None, True, float("nan"), float("inf"), [1, 2], "none", ""])
def test_what_is_no_number_is_refused_as_answer(answer: object) -> None:
    with pytest.raises(ValueError, match="numeric_match needs a number in the column 'answer', got"):
        numeric_match(["1"], [answer])
    with pytest.raises(ValueError, match="exact_match needs a text or a number"):
        exact_match(["None"], [None])


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


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("completion", "any_json", "by_schema"),
    [
        ('{"name": "Ada", "age": 36}', 1.0, 1.0),
        (' ```json\n{"name": "Ada"}\n``` ', 1.0, 1.0),
        ('```\n{"name": "Ada"}\n```', 1.0, 1.0),
        ('{"age": 36}', 1.0, 0.0),
        ('{"name": "Ada", "age": -1}', 1.0, 0.0),
        ('{"name": "Ada", "pet": "cat"}', 1.0, 0.0),
        ("[1, 2]", 1.0, 0.0),
        ('Here it is: {"name": "Ada"}', 0.0, 0.0),
        ('{"name": "Ada"', 0.0, 0.0),
        ('{"name": NaN}', 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_json_is_the_whole_completion_and_keeps_to_the_schema(
    completion: str, any_json: float, by_schema: float
) -> None:
    assert json_match([completion]) == [any_json]
    assert json_match([completion], schema=SCHEMA) == [by_schema]


def test_a_schema_that_is_none_is_refused() -> None:
    from jsonschema import SchemaError

    with pytest.raises(SchemaError, match="'text' is not valid"):
        json_match(["1"], schema={"type": "text"})


def test_lengths_are_in_tokens() -> None:
    ids = [[1] * 4, [1] * 10, []]
    assert length(ids) == [-4.0, -10.0, 0.0]
    assert length(ids, target=6, scale=2.0) == [-1.0, -2.0, -3.0]


def test_overlong_falls_in_a_line_over_its_cache() -> None:
    ids = [[1] * n for n in (0, 8, 9, 10, 12, 15)]
    assert overlong(ids, max_tokens=12, cache=4) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="needs 0 < cache <= max_tokens, got 5 and 4"):
        overlong(ids, max_tokens=4, cache=5)
