"""The shipped configs of PAPO's runs pass the check, with a tiny model of their kind and two questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.compute_dtype import with_dtype
from rlhf.config.load import load_config
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from tests.vision.support import WIDE

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("papo_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_paper_check(path: Path, tmp_path: Path, tiny_vlm: Callable[[str], Path]) -> None:
    # the tiny model has positions for fewer tokens than these configs sample
    limits = ["data.max_prompt_tokens=200", "rollout.max_completion_tokens=64"]
    assert isinstance(WIDE, bytes)
    (tmp_path / "wide.png").write_bytes(WIDE)
    row = {"prompt": [{"role": "user", "content": "<image> 1 + 1?"}], "images": ["wide.png"], "answer": "2"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    model = tiny_vlm("qwen2_5_vl")
    config = with_dtype(
        load_config(path, [f"model.path={model}", f"data.train={tmp_path}/train.jsonl", *limits])
    )
    inputs = load_inputs(config)
    lines = "\n".join(describe(config, inputs))
    assert "images       2, in 2 of the 2 prompts" in lines
    assert "perception   coef 0.0" in lines
    assert inputs.algorithm.perception is not None
    assert inputs.algorithm.needs_reference == ("papo_g_qwen" in path.stem)
    assert config.rollout.group_size == 5
    inputs.rewards.close()


def test_there_is_a_config_for_each_run_of_the_paper() -> None:
    assert len(CONFIGS) == 5
