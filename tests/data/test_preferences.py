"""Pairs, labels and lists: every format that a dataset may have, and what is refused, with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import DataConfig
from rlhf.data.completions import OfflineDataset, load_offline
from rlhf.models.pretrained import load_tokenizer
from rlhf.types import Duel, Group

EOS = 2
ASK = [{"role": "user", "content": "one two"}]

SYSTEM = {"role": "system", "content": "Hm"}
SHAREGPT = [{"from": "human", "value": "one two"}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def load(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., OfflineDataset]:
    tokenizer = load_tokenizer(str(tiny_model_dir))

    def load(rows: list[dict[str, Any]], **settings: Any) -> OfflineDataset:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = DataConfig.model_validate({"train": str(file), "mode": "offline"} | settings)
        return load_offline(file, tokenizer, section, max_completion_tokens=32, eos_token_id=EOS)

    return load


def only(dataset: OfflineDataset) -> Group:
    [group] = dataset.groups
    return group


def texts(group: Group) -> list[str]:
    return [t.text for t in group.trajectories]


def test_a_pair_is_a_group_of_two_with_rewards_one_and_zero(load: Callable[..., OfflineDataset]):
    group = only(load([{"prompt": "one", "chosen": "good", "rejected": "bad", "source": "web"}]))
    assert texts(group) == ["good", "bad"]
    assert [t.reward for t in group.trajectories] == [1.0, 0.0]
    assert all(t.rollout_logprobs is None and t.token_ids[-1] == EOS for t in group.trajectories)
    assert group.prompt.columns == {"source": "web"}
    assert group.duels == ()


def test_text_messages_and_an_implicit_prompt_give_the_same_tokens(load: Callable[..., OfflineDataset]):
    forms = [
        {"prompt": ASK, "chosen": "good", "rejected": "bad"},
        {"prompt": ASK, "chosen": says("good"), "rejected": says("bad")},
        {"chosen": [*ASK, *says("good")], "rejected": [*ASK, *says("bad")]},
        # as UltraFeedback: the prompt stands beside whole conversations
        {"prompt": "one two", "chosen": [*ASK, *says("good")], "rejected": [*ASK, *says("bad")]},
        {"prompt": None, "chosen": [*ASK, *says("good")], "rejected": [*ASK, *says("bad")]},
        {"prompt": ASK, "chosen": says("good")[0], "rejected": says("bad")[0]},
        # one side has a key that the other lacks
        {"chosen": [ASK[0] | {"name": None}, *says("good")], "rejected": [*ASK, *says("bad")]},
        {"chosen": [*SHAREGPT, {"from": "gpt", "value": "good"}], "rejected": [*ASK, *says("bad")]},
    ]
    groups = [only(load([row])) for row in forms]
    assert len({g.prompt.token_ids for g in groups}) == 1
    assert len({tuple(t.token_ids for t in g.trajectories) for g in groups}) == 1
    assert [g.prompt.content for g in groups] == [ASK] * len(forms)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([SYSTEM, *ASK], [SYSTEM, *ASK]),
        # the first message of a longer chat
        (ASK, [*ASK, *says("three?"), *ASK]),
        ("one  two ", [*ASK, *says("three?"), *ASK]),
        ("Answer this: one two", ASK),
    ],
)
def test_a_prompt_beside_whole_chats_may_be_longer_or_shorter(
    load: Callable[..., OfflineDataset], given: Any, kept: list[dict[str, str]]
):
    start = [message for message in kept if message is not SYSTEM]
    row = {"prompt": given, "chosen": [*start, *says("good")], "rejected": [*start, *says("bad")]}
    group = only(load([row]))
    assert group.prompt.content == kept
    assert texts(group) == ["good", "bad"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("Sky: it is blue", "Sky: it is red", "Sky: it is", [" blue", " red"]),
        # no word is split, although both begin with bl
        ("Sky: blue", "Sky: black", "Sky:", [" blue", " black"]),
        ("Sky: blue", "Sky: blue or so", "Sky:", [" blue", " blue or so"]),
        ("Q?\n yes ", "Q?\n yes no", "Q?\n", [" yes ", " yes no"]),
        ("Q?\nyes", "Q?\nno", "Q?\n", ["yes", "no"]),
    ],
)
def test_the_common_beginning_of_two_texts_is_the_prompt(
    load: Callable[..., OfflineDataset], chosen: str, rejected: str, prompt: str, answers: list[str]
):
    group = only(load([{"chosen": chosen, "rejected": rejected}]))
    assert group.prompt.content == prompt
    assert texts(group) == answers


def test_a_probability_is_a_soft_label(load: Callable[..., OfflineDataset]):
    group = only(load([{"prompt": "one", "chosen": "good", "rejected": "bad", "probability": 0.8}]))
    assert group.duels == (Duel(0, 1, 0.8),)


def test_a_label_makes_a_group_of_one(load: Callable[..., OfflineDataset]):
    rows = [{"prompt": "one", "completion": text, "label": label} for text, label in (("a", True), ("b", 0))]
    groups = load(rows).groups
    assert [[t.reward for t in g.trajectories] for g in groups] == [[1.0], [0.0]]


def test_lists_of_completions_are_a_group(load: Callable[..., OfflineDataset]):
    row = {"prompt": "one", "completions": ["a", says("b"), "c"], "rewards": [0.1, None, -2]}
    group = only(load([row]))
    assert texts(group) == ["a", "b", "c"]
    assert [t.reward for t in group.trajectories] == [0.1, None, -2.0]


def test_a_list_of_equal_completions_is_no_pair_and_stays(load: Callable[..., OfflineDataset]):
    data = load([{"prompt": "one", "completions": ["a", "a"], "rewards": [1, 0.5]}])
    assert texts(only(data)) == ["a", "a"] and data.identical == 0


def test_where_reward_functions_score_a_column_label_is_theirs(load: Callable[..., OfflineDataset]):
    rows = [{"prompt": "2 + 2?", "completion": text, "label": "4"} for text in ("4", "5")]
    group = only(load(rows, reward_column=None))
    assert texts(group) == ["4", "5"] and group.prompt.columns == {"label": "4"}


def test_lines_with_one_prompt_stay_apart(load: Callable[..., OfflineDataset]):
    rows = [{"prompt": "one", "chosen": "good", "rejected": bad} for bad in ("x", "y")]
    data = load(rows)
    assert [texts(g) for g in data.groups] == [["good", "x"], ["good", "y"]]
    assert len({g.prompt.id for g in data.groups}) == 2
    assert data.splitting == ()


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "good", "rejected": "bad"},
        {"completions": ["good", "bad"]},
        {"completion": "good"},
    ],
)
def test_reward_functions_may_score_any_format(load: Callable[..., OfflineDataset], row: dict[str, Any]):
    group = only(load([{"prompt": "one"} | row], reward_column=None))
    assert {t.reward for t in group.trajectories} == {None}


def test_pairs_of_the_same_completion_are_left_out_and_counted(load: Callable[..., OfflineDataset]):
    rows = [{"prompt": "one", "chosen": "good", "rejected": bad} for bad in ("good", "bad")]
    data = load(rows)
    assert len(data.groups) == 1 and data.identical == 1
    with pytest.raises(ValueError, match="in all 1 lines chosen and rejected are the same"):
        load(rows[:1])


def test_a_pair_with_one_side_too_long_is_left_out(load: Callable[..., OfflineDataset]):
    rows = [{"prompt": "one", "chosen": "good", "rejected": bad} for bad in ("b" * 40, "bad")]
    data = load(rows, long_prompts="skip")
    assert [texts(g) for g in data.groups] == [["good", "bad"]] and data.skipped == 1
    with pytest.raises(ValueError, match=r"1 lines are longer than .*data\.jsonl:1"):
        load(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, "a pair needs the columns 'chosen', 'rejected'"),
        ({"prompt": "x", "chosen": "a", "rejected": None}, "column 'rejected' must be non-empty text"),
        (
            {"prompt": "x", "chosen": "a", "rejected": [*says("b"), *ASK, *says("c")]},
            r"one message of the assistant, got 3 \(assistant, user, assistant\)",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": ASK}, "must be the assistant's, but its role is 'user'"),
        ({"chosen": "a b", "rejected": "c d"}, "do not begin alike, so that the prompt cannot be told"),
        ({"chosen": " a", "rejected": " b"}, "do not begin alike"),
        ({"chosen": says("a"), "rejected": says("b")}, "do not begin alike"),
        # answers that begin alike are no prompt where there is one
        (
            {
                "prompt": "x",
                "chosen": [*says("a"), *ASK, *says("b")],
                "rejected": [*says("a"), *ASK, *says("c")],
            },
            r"'chosen' must hold one message of the assistant, got 3 \(assistant, user, assistant\); give",
        ),
        (
            {"prompt": "x", "chosen": [*ASK, *says("a")], "rejected": [*ASK, *says("b")]},
            "column 'prompt' has another prompt, 'x', than chosen and rejected begin with",
        ),
        (
            {"prompt": [SYSTEM], "chosen": [*ASK, *says("a")], "rejected": [*ASK, *says("b")]},
            "has another prompt, .*remove the column",
        ),
        ({"chosen": [*ASK, *says("a")], "rejected": "b"}, "chosen, which is chat messages, and .* is text"),
        ({"chosen": [*ASK, "a"], "rejected": [*ASK, "b"]}, "column 'chosen' must be .* message 1 is 'a'"),
        (
            {"prompt": "x", "chosen": [says("a")[0] | {"tool_calls": [{"name": "f"}]}], "rejected": "b"},
            "column 'chosen' has 'tool_calls', and only its content would be learned from; write",
        ),
        (
            {"prompt": "x", "chosen": "a", "rejected": [says("b")[0] | {"reasoning_content": "hm"}]},
            "column 'rejected' has 'reasoning_content'",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "probability": 1.5}, "a number from 0 to 1"),
        ({"prompt": "x", "completion": "a", "label": "yes"}, "must be true or false, got 'yes'"),
        ({"prompt": "x", "label": True}, "a labelled completion needs the columns 'completion'"),
        ({"prompt": "x", "completions": [], "rewards": []}, "must be a list of completions"),
        ({"prompt": "x", "completions": ["a", "b"], "rewards": [1]}, "a list of 2 numbers"),
        ({"prompt": "x", "completions": ["a", "b"]}, "'rewards'"),
        ({"prompt": "x", "completions": ["a", "b"], "rewards": [1, "hi"]}, "finite number or null"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(
    load: Callable[..., OfflineDataset], row: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as found:
        load([row])
    assert "data.jsonl:1" in str(found.value)
