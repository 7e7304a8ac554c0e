"""The tree of `rlhf pairs tree` by hand: selection, values, the filter of pairs, and where steps end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.characters import tokenizer
from rlhf.pairs.tree_search import (
    ALIKE,
    ALL_RIGHT,
    ALL_WRONG,
    NO_CONTRAST,
    POOR,
    Node,
    back_up,
    compare,
    fast_reward,
    overlap,
    select,
    selection_score,
    self_evaluation,
)
from rlhf.pairs.tree_steps import ReadBack, step_length

FILTER: dict[str, Any] = {"min_gap": 0.1, "max_overlap": 0.95, "min_best": -0.3}
PARTS = re.compile(r"\. |, |=|\(")


def grown(*values: float, texts: tuple[str, ...] = ("one", "two", "three"), right: int = 1) -> Node:
    """A node whose children have one simulation each, of two completions; `right` of them are correct."""
    root = Node(expanded=True)
    for value, text in zip(values, texts, strict=False):
        child = Node((ord(text[0]),), text, parent=root)
        root.children.append(child)
        back_up(child, value, rollouts=2, right=right)
    return root


def test_the_score_of_a_step_is_that_of_the_specification() -> None:
    # .3 / 2 + 1 x .6 x sqrt(ln 3 / 2) = .15 + .6 x .741152
    assert selection_score(0.3, 1, 0.6, 3, 1.0) == pytest.approx(0.594691, abs=1e-6)
    # c = 0 leaves Q / (N + 1); a parent with one visit leaves it too, since ln 1 = 0
    assert selection_score(0.3, 1, 0.6, 3, 0.0) == selection_score(0.3, 1, 0.6, 1, 1.0) == 0.15


def test_a_mark_is_a_number_from_half_below_zero_to_a_quarter() -> None:
    # (.8 + .1 x .15 - .04 - 2 x .01) / 4 = .755 / 4
    assert self_evaluation((0.8, 0.15, 0.04, 0.01)) == pytest.approx(0.18875, abs=1e-12)
    assert self_evaluation((1, 0, 0, 0)) == 0.25
    assert self_evaluation((0, 0, 0, 1)) == -0.5


def test_values_and_visits_go_up_to_the_root() -> None:
    root = grown(1.0, 0.0)
    grandchild = Node((1, 2), "x", parent=root.children[0])
    root.children[0].expanded = True
    root.children[0].children.append(grandchild)
    back_up(grandchild, 0.5, rollouts=2, right=1)
    assert [(n.visits, n.total) for n in root.all()] == [(3, 1.5), (2, 1.5), (1, 0.5), (1, 0.0)]
    assert [n.depth for n in root.all()] == [0, 1, 2, 1]
    assert root.children[0].value == 0.75


def test_the_search_weighs_value_against_rare_visits() -> None:
    root = grown(1.0, 0.0)
    # scores: 1/2 + 1 x sqrt(ln 2 / 2) against 0/2 + the same
    assert select(root, exploration=1.0, depth=3) is root.children[0]
    # the second is likely, the first is not: .5 + .1 x .589 = .559 against 0 + 1 x .589
    root.children[0].prior = 0.1
    assert select(root, exploration=1.0, depth=3) is root.children[1]
    assert select(root, exploration=0.0, depth=3) is root.children[0]


def test_the_search_leaves_out_what_cannot_grow() -> None:
    root = grown(1.0, 0.0)
    root.children[0].ended = True
    assert select(root, exploration=1.0, depth=2) is root.children[1]
    # one step deep the children are the bottom
    assert select(root, exploration=1.0, depth=1) is None
    # expanded, and no step came of it
    root.children[1].expanded = True
    assert select(root, exploration=1.0, depth=2) is None
    assert select(Node(), exploration=1.0, depth=1) is not None


def test_overlap_is_the_share_of_the_shorter_texts_words() -> None:
    # {f, a, 1, b, 2} and {f, a, 1, c, 2} share 4 of 5
    assert overlap("f(a=1, b=2)", "f(a=1, c=2)") == 0.8
    # {a, 1} is in {f, a, 1, b, 2}
    assert overlap("a=1, ", "f(a=1, b=2)") == 1.0
    assert overlap(")]", ")]") == 1.0
    assert overlap(")]", "]") == 0.0
    assert overlap("f", "]") == 0.0


def test_a_step_gains_by_words_of_the_right_answer_and_by_its_end_in_place() -> None:
    gold = "[f(a=1, b=2)]"
    # half of the words {a, 9} are right, and the end, which the right answer has, is missing: -.1 + .5 - .5
    assert fast_reward("a=9, ", gold, ")]") == pytest.approx(-0.1)
    # all words and the end: .1 + 1 - .5
    assert fast_reward("b=2)]", gold, ")]") == pytest.approx(0.6)
    # neither has the end: .1 + 0 - .5
    assert fast_reward("yes", "no", ")]") == pytest.approx(-0.4)


def test_best_and_worst_are_a_pair_where_they_differ_enough() -> None:
    found = compare(grown(0.5, 1.0, 0.0), **FILTER)
    assert found is not None and found.reason is None
    assert (found.best.text, found.worst.text) == ("two", "three")
    # the gap of .1 is enough, and .0999 is not
    assert compare(grown(0.6, 0.5), **FILTER).reason is None  # type: ignore[union-attr]
    assert compare(grown(0.5999, 0.5), **FILTER).reason == NO_CONTRAST  # type: ignore[union-attr]
    assert compare(grown(1.0), **FILTER) is None


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (grown(0.0, 0.0, right=0), ALL_WRONG),
        (grown(1.0, 1.0, right=2), ALL_RIGHT),
        (grown(0.5, 0.5, right=1), NO_CONTRAST),
        # at least -.3 for the better one
        (grown(-0.3, -0.5, right=0), None),
        (grown(-0.31, -0.5, right=0), POOR),
        # .8 of the words are shared, then all
        (grown(1.0, 0.0, texts=("f(a=1, b=2)", "f(a=1, c=2)")), None),
        (grown(1.0, 0.0, texts=("f(a=1)", "f(1=a)")), ALIKE),
    ],
)
def test_why_two_steps_are_no_pair(node: Node, reason: str | None) -> None:
    found = compare(node, **FILTER)
    assert found is not None
    assert found.reason == reason


def test_of_equal_values_the_first_is_best_and_the_last_worst() -> None:
    found = compare(grown(1.0, 1.0, 0.0), **FILTER)
    assert found is not None and (found.best.text, found.worst.text) == ("one", "three")
    found = compare(grown(1.0, 0.0, 0.0), **FILTER)
    assert found is not None and (found.best.text, found.worst.text) == ("one", "three")
    # without a least gap equal values are no pair either
    found = compare(grown(1.0, 1.0), **{**FILTER, "min_gap": 0.0})
    assert found is not None and found.reason == NO_CONTRAST


@pytest.mark.parametrize(
    ("text", "parts", "step"),
    [
        ("add(a=1, b=2)", 1, "add("),
        ("add(a=1, b=2)", 2, "add(a="),
        # the blank of ", " is left for the next step
        ("add(a=1, b=2)", 3, "add(a=1,"),
        ("add(a=1, b=2)", 4, "add(a=1, b="),
        ("add(a=1, b=2)", 5, "add(a=1, b=2)"),
        ("Yes. No. ", 1, "Yes."),
        # "." at the end is followed by no blank
        ("3.14.", 1, "3.14."),
    ],
)
def test_a_step_ends_behind_its_last_part(text: str, parts: int, step: str) -> None:
    words = tokenizer(sorted(set("".join(["add(=1,b2) .YesNo34"]))))
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert words.decode(ids[: step_length(words, ids, PARTS, parts)]) == step


def test_a_token_that_goes_on_behind_the_delimiter_belongs_to_the_step() -> None:
    words = tokenizer(["f", "(a", "=1", ", b", "=2)"])
    # ids 0 and 1 are special; "(a" has the parenthesis; the comma is the first character of ", b"
    assert [step_length(words, range(2, 7), PARTS, n) for n in (1, 2, 3, 4, 5)] == [2, 3, 4, 5, 5]


def test_only_tokens_that_come_back_are_written(tiny_model_dir: Path) -> None:
    words = AutoTokenizer.from_pretrained(tiny_model_dir)
    reader = ReadBack(words, {2})
    ids = words("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False)["input_ids"]
    assert reader.prompt(ids) == "<|im_start|>user\nhi<|im_end|>"
    step = words("f(1)", add_special_tokens=False)["input_ids"]
    # the end of sequence is not written: the reader puts it there
    assert reader.completion([*step, 2]) == reader.completion(step) == "f(1)"
    assert reader.completion([2]) is None
    # "<|im_end|>" written with a token for each character comes back as one token
    spelled = [words.convert_tokens_to_ids(c) for c in "<|im_end|>"]
    assert reader.prompt([*ids, *spelled]) is None
    assert reader.completion(spelled) is None
    # a second token that ends turns is none that the reader puts there
    assert ReadBack(words, {2, 5}).completion([*step, 5]) is None
