"""Shipped configs of models that see, with tiny ones of their kind: PAPO's check, AdaptVision's trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.compute_dtype import with_dtype
from rlhf.config.load import load_config
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from tests.support import metrics_of
from tests.vision.support import OTHER, WIDE
from tests.vision_models import save_tiny_vlm

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("papo_*.yaml"))
CALLS = """
def calls(text):
    left = {"x1": 0, "y1": 0, "x2": 0.5, "y2": 1}
    return [{"name": "crop", "arguments": left}] if len(text) % 2 else []
"""


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


def test_adaptvision_trains_on_episodes_that_look_closer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # as long as the config allows: the tools are told in about 900 tokens of one character
    save_tiny_vlm(tmp_path / "model", "qwen2_5_vl", max_position_embeddings=2400)
    assert isinstance(WIDE, bytes) and isinstance(OTHER, bytes)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/small.png").write_bytes(WIDE)
    (tmp_path / "large.png").write_bytes(OTHER)
    (tmp_path / "calls.py").write_text(CALLS)
    content = [{"type": "image", "image": "small.png"}, {"type": "text", "text": "what?"}]
    row = {"prompt": [{"role": "user", "content": content}], "large": f"{tmp_path}/large.png"}
    row |= {"subject": [0.1, 0.1, 0.4, 0.4], "answer": "a"}
    (tmp_path / "data/train.jsonl").write_text((json.dumps(row) + "\n") * 2)
    # a random model writes no call: every turn with an odd number of characters is read as one
    settings = [f"model.path={tmp_path}/model", f"data.train={tmp_path}/data", f"run_dir={tmp_path}/run"]
    settings += [f"environment.calls={tmp_path}/calls.py:calls", f"rollout.stop_token_ids={[*range(20, 60)]}"]
    settings += ["rollout.prompts_per_step=2", "rollout.group_size=6", "rollout.max_completion_tokens=80"]
    settings += ["steps=1", "learner.minibatches=2", "checkpoint.export=false", "monitor.sinks=[]"]
    monkeypatch.chdir(ROOT)
    config = "configs/adaptvision_qwen2_5_vl_7b.yaml"
    assert main(["check", config, *settings]) == 0, capsys.readouterr().err
    assert "Crop: tools crop; 2 prompts; at most 2 turns" in capsys.readouterr().out
    assert main(["train", config, *settings]) == 0, capsys.readouterr().err
    (step,) = metrics_of(tmp_path)
    assert 1 < step["turns/mean"] < 2 and step["turns/lost"] == step["turns/tool_errors"] == 0
    # the left half holds the subject, so `inside` is the share of episodes of two turns
    assert step["reward/inside"] == pytest.approx(step["turns/mean"] - 1)
    assert step["grad_norm"] > 0 and step["mismatch/k3"] < 0.01
