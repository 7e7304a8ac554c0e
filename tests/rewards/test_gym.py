"""reasoning-gym: one line of a config gives both the dataset and the reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.load import make_config
from rlhf.data.prompts import PromptDataset, load_prompts
from rlhf.models.pretrained import load_tokenizer
from rlhf.rewards.gym import score
from tests.config.test_config import settings

Load = Callable[[str], PromptDataset]


@pytest.fixture
def load(tiny_model_dir: Path) -> Load:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    return lambda source: load_prompts(source, tokenizer, max_prompt_tokens=512)


def test_entries_depend_on_seed_and_place_alone(load: Load) -> None:
    few = load("gym:chain_sum?size=3&seed=7&max_terms=2")
    more = load("gym:chain_sum?size=9&seed=7&max_terms=2")
    assert few.prompts == more.prompts[:3]
    assert (len(few), len(more)) == (3, 9)
    assert few.columns == ("answer", "gym")
    assert few[0].id == "chain_sum:0"


def test_the_task_judges_the_answer(load: Load) -> None:
    columns = load("gym:chain_sum?size=1&seed=1")[0].columns
    answer, entry = columns["answer"], columns["gym"]
    said = [
        f"I think <answer>{answer}</answer>",
        f"<answer>1</answer> no: <answer>{answer}</answer>",
        "it is 8",
    ]
    assert score(said, [entry] * 3)[:2] == [1.0, 1.0]
    assert score(said, [entry] * 3)[2] < 0.1
    assert score([f"So it is {answer}."], [entry], extract="number") == [1.0]
    assert score([str(answer)], [entry], extract="whole") == [1.0]


def test_a_question_is_a_message_or_text_with_an_instruction(load: Load) -> None:
    chat = load("gym:chain_sum?size=1&instruction=Answer in tags.")[0].content
    text = load("gym:chain_sum?size=1&chat=false")[0].content
    assert chat == [{"role": "user", "content": f"{text}\nAnswer in tags."}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gym:chain_sun", "no task 'chain_sun'; did you mean 'chain_sum'"),
        ("gym:chain_sum?min_term=2", "no setting 'min_term'; did you mean 'min_terms'"),
        ("gym:chain_sum?min_terms=-3", "gym:chain_sum"),
    ],
)
def test_a_mistake_is_named(load: Load, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(source)


def test_the_reward_comes_with_the_data_unless_another_is_named() -> None:
    without = settings(data={"train": "gym:chain_sum"})
    del without["reward"]
    assert make_config(without).reward.functions[0].path == "gym"
    assert make_config(settings(data={"train": "gym:chain_sum"})).reward.functions[0].path == "a:b"
