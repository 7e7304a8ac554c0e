"""The examples in docs/rewards.md are valid configs, and its lists are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config.load import make_config
from rlhf.config.reward import JudgeConfig, RewardFunction
from rlhf.rewards.builtin import exact_match, format_match, json_match
from rlhf.rewards.code import program_of
from rlhf.rewards.judges.plugin import BUILT_IN as JUDGES
from rlhf.rewards.plugin import BUILT_IN, RewardSpec, load_reward
from tests.config.test_config import settings
from tests.rewards.answers import rows
from tests.rewards.test_hostile import CASES

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_is_a_config(number: int) -> None:
    made: dict[str, Any] = {**settings(), **yaml.safe_load(EXAMPLES[number])}
    make_config(made)


def test_the_functions_shown_do_what_they_say(tmp_path: Path) -> None:
    brevity, lines = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(f"{brevity}\n{lines}")
    reward = load_reward(RewardSpec(f"{tmp_path}/my_rewards.py:brevity", params={"limit": 3}))
    chats = [[{"role": "assistant", "content": text}] for text in ("abc", "abcd")]
    assert reward({"completions": chats, "answer": [1, 2]}) == [1.0, 0.0]
    of_steps = load_reward(RewardSpec(f"{tmp_path}/my_rewards.py:lines"))
    chats = [[{"role": "assistant", "content": "3 + 5\nso\n8"}]]
    assert of_steps({"completions": chats}) == [[(6, 1.0), (9, -1.0), (10, 1.0)]]


def test_the_answers_in_the_docs_are_rows_of_the_table_that_is_tested() -> None:
    table = TEXT.partition("| completion | `answer` | `numeric_match` | `math_match` |\n|---|---|---|---|\n")[
        2
    ]
    shown = [
        [cell.strip("` ") for cell in row.strip("|").split(" | ")]
        for row in table.partition("\n\n")[0].splitlines()
    ]
    tested = {(c.replace("\n", "\\n"), a): (n, m) for c, a, n, m in rows()}
    assert len(shown) == 20
    for completion, answer, numeric, equal in shown:
        assert tested[completion, answer] == (float(numeric), float(equal)), completion


def test_what_each_verifier_takes_is_what_the_docs_say() -> None:
    """One completion for each row of the table of verifiers that no other test of the docs runs."""
    verifiers = re.findall(r"\n\| `(\w+)` \| ", TEXT.partition("| verifier |")[2].partition("**Where.**")[0])
    assert verifiers == [
        "exact_match",
        "numeric_match",
        "math_match",
        "format_match",
        "json_match",
        "code",
        "gym",
        "judge",
        "goal",
    ]
    assert exact_match([" 8\n", "It is 8"], ["8", "8"]) == [1.0, 0.0]
    assert format_match(["a</t>"], ["t"], opened="<t>") == [1.0]
    assert json_match(["```json\n1\n```", "so ```json\n1\n```"]) == [1.0, 0.0]
    assert program_of("```python3\nx = 1\n```\n```text\n1\n```") == "x = 1\n"
    assert program_of("x = 2") == "x = 2"


def test_every_built_in_and_every_setting_is_listed() -> None:
    for name in (*BUILT_IN, *JUDGES, *RewardFunction.model_fields, *JudgeConfig.model_fields):
        assert f"`{name}`" in TEXT, name
    assert f"{len(CASES)} behaviours" in TEXT
