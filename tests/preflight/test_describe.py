"""What `rlhf check` says of preference methods and of the forms of their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.algos.preference.table import PREFERENCE
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from tests.support import bandit_settings

PAIRS = [{"prompt": "ab", "chosen": "c", "rejected": "def"}] * 8
SAME = [{"prompt": "ab", "chosen": "c", "rejected": "c"}] * 3
LABELS = [{"prompt": "ab", "completion": "c" * (i % 4 + 1), "label": i % 2 == 0} for i in range(8)]
LISTS = [{"prompt": "ab", "completions": ["c", "d", "e"], "rewards": [1, 0, 0.5]}] * 8


@pytest.fixture
def said(tmp_path: Path, tiny_model_dir: Path):
    def said(rows: list[dict[str, Any]], algorithm: str = "dpo", **data: Any) -> str:
        settings = bandit_settings(tmp_path, tiny_model_dir) | {"algorithm": {"name": algorithm}}
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = str(tmp_path / "data.jsonl")
        settings["data"] |= {"train": path, "mode": "offline"} | data
        if data.get("mode") != "online":
            settings["reward"] = {"functions": []}
        config = make_config(settings)
        return "\n".join(describe(config, load_inputs(config)))

    return said


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_method_says_pairs_where_it_learns_pairs(said, name: str) -> None:
    text = said(PAIRS + SAME, name, eval=None)
    # characters and the end-of-sequence token: 2 of the chosen, 4 of the rejected completions
    assert "completions  16 of 2 to 4 tokens (median 3) in the data, as 8 pairs, 0 lines skipped" in text
    assert "3 pairs left out, because their two completions are the same" in text
    assert "a step       8 pairs, from the data" in text
    assert "rewards      1 for chosen, 0 for rejected\n" in text
    assert "kl=none" in text and "no KL term" not in text
    has_reference = name not in ("slic", "simpo", "cpo", "orpo")
    assert (f"none: {name} compares log-probs of the policy alone" in text) is not has_reference


def test_an_imitation_of_pairs_says_prompts(said) -> None:
    text = said(PAIRS, "best_of")
    assert "8 prompts with all their completions, from the data" in text and "none: no KL term" in text


def test_labels_and_lists_are_told_as_such(said) -> None:
    text = said(LABELS, "kto")
    assert "1 or 0 by column label of the data" in text and "each completion is good or bad by itself" in text
    assert "8 prompts with a completion each, from the data" in text
    text = said(LISTS)
    assert "column rewards of the data" in text and "by pairs.rule = best_worst, of different rewards" in text


def test_held_out_pairs_are_told_with_those_left_out(said, tmp_path: Path) -> None:
    text = said(PAIRS + SAME, eval=str(tmp_path / "data.jsonl"))
    assert "held out     8 pairs (3 more left out, whose completions are the same)" in text


def test_sampling_for_a_file_of_pairs_is_a_warning(said) -> None:
    text = said(PAIRS, mode="online", eval=None)
    assert "only its prompts are used" in text and "set data.mode: offline" in text
    assert "pairs        of each prompt by pairs.rule = best_worst" in text


def test_sampling_for_pairs_without_a_prompt_is_refused_with_the_mode_to_set(said) -> None:
    with pytest.raises(ConfigError, match=r"to learn from them set data.mode: offline"):
        said([{"chosen": "ab c", "rejected": "ab d"}] * 8, mode="online", eval=None)


def test_no_reward_function_for_a_preference_method_names_the_mode(tmp_path: Path) -> None:
    settings = bandit_settings(tmp_path, tmp_path) | {"algorithm": "dpo", "reward": {"functions": []}}
    with pytest.raises(ConfigError, match=r"chosen and rejected in data.train set data.mode: offline"):
        make_config(settings)
    with pytest.raises(ConfigError, match=r"there are rollouts to score$"):
        make_config(settings | {"algorithm": "grpo"})
