"""The examples in docs/rewards.md are valid configs, and its lists are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config.load import make_config
from rlhf.config.reward import RewardFunction
from rlhf.rewards.plugin import BUILT_IN, RewardSpec, load_reward
from tests.config.test_config import settings
from tests.rewards.test_hostile import CASES

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_is_a_config(number: int) -> None:
    made: dict[str, Any] = {**settings(), **yaml.safe_load(EXAMPLES[number])}
    make_config(made)


def test_the_function_shown_does_what_it_says(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    reward = load_reward(RewardSpec(f"{tmp_path}/my_rewards.py:brevity", params={"limit": 3}))
    chats = [[{"role": "assistant", "content": text}] for text in ("abc", "abcd")]
    assert reward({"completions": chats, "answer": [1, 2]}) == [1.0, 0.0]


def test_every_built_in_and_every_setting_is_listed() -> None:
    for name in (*BUILT_IN, *RewardFunction.model_fields):
        assert f"`{name}`" in TEXT, name
    assert f"{len(CASES)} behaviours" in TEXT
