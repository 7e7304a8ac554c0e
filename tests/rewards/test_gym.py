"""reasoning-gym: a line of config is data and reward."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import make_config
from rlhf.data import inspect_prompts
from rlhf.rewards.gym import score
from tests.test_config import settings


def test_entries_depend_on_seed_and_place_alone() -> None:
    few = inspect_prompts(Path("gym:chain_sum?size=3&seed=7&max_terms=2"))
    more = inspect_prompts(Path("gym:chain_sum?size=9&seed=7&max_terms=2"))
    assert few.first == tuple(
        type(row)(row.id, few_row.where, row.columns)
        for row, few_row in zip(more.first, few.first, strict=True)
    )
    assert (few.count, more.count) == (3, 9)
    assert few.columns == ("answer", "gym")
    assert few.first[0].id == "chain_sum:0"


def test_the_task_judges_the_answer() -> None:
    row = inspect_prompts(Path("gym:chain_sum?size=1&seed=1")).first[0]
    answer, entry = row.columns["answer"], row.columns["gym"]
    said = [
        f"I think <answer>{answer}</answer>",
        f"<answer>1</answer> no: <answer>{answer}</answer>",
        "it is 8",
    ]
    assert score(said, [entry] * 3)[:2] == [1.0, 1.0]
    assert score(said, [entry] * 3)[2] < 0.1
    assert score([f"So it is {answer}."], [entry], extract="number") == [1.0]
    assert score([str(answer)], [entry], extract="whole") == [1.0]


def test_a_question_is_a_message_or_text_with_an_instruction() -> None:
    chat = (
        inspect_prompts(Path("gym:chain_sum?size=1&instruction=Answer in tags.")).first[0].columns["prompt"]
    )
    text = inspect_prompts(Path("gym:chain_sum?size=1&chat=false")).first[0].columns["prompt"]
    assert chat == [{"role": "user", "content": f"{text}\nAnswer in tags."}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gym:chain_sun", "no task 'chain_sun'; did you mean 'chain_sum'"),
        ("gym:chain_sum?min_term=2", "no setting 'min_term'; did you mean 'min_terms'"),
        ("gym:chain_sum?min_terms=-3", "gym:chain_sum"),
    ],
)
def test_a_mistake_is_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_prompts(Path(source))


def test_the_reward_comes_with_the_data_unless_another_is_named() -> None:
    without = settings(data={"train": "gym:chain_sum"})
    del without["reward"]
    assert make_config(without).reward.functions[0].path == "gym"
    assert make_config(settings(data={"train": "gym:chain_sum"})).reward.functions[0].path == "a:b"
