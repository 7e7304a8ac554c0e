"""Runs of two adapters: they learn, the fast one is exported, and they resume byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.cli import main
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from tests.e2e.test_preference_runs import evaluations, settings
from tests.support import metrics_of, train, train_interrupted, without_clocks

pytest.importorskip("peft")


def two_adapters(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of four steps in which the fast adapter overshoots, so that the two change places."""
    folder.mkdir(exist_ok=True)
    made = settings(folder, model, algorithm={"name": "ofs_dpo", "lr_ratio": 0.05, "interval": 2})
    made["model"]["lora"] = {"rank": 4}
    made["learner"] |= {"lr": 0.3, "eps": 1e-8, "minibatches": 2}
    made["checkpoint"] = {"export": True, "every": 0}
    return made | {"steps": 4} | changes


def test_a_run_that_stops_within_steps_goes_on_as_if_it_had_not(tmp_path: Path, tiny_model_dir: Path):
    straight = two_adapters(tmp_path / "straight", tiny_model_dir)
    train(straight)
    steps = metrics_of(tmp_path / "straight")
    assert [step["twin/swaps"] for step in steps] == [0, 1, 0, 0]
    assert [step["lr"] for step in steps] == [0.3, 0.3, 0.015, 0.015]
    assert [step["twin/slow_lr"] for step in steps] == [0.015, 0.015, 0.3, 0.3]
    assert evaluations(tmp_path / "straight")[-1]["accuracy"] > 0.5
    stopped = two_adapters(tmp_path / "stopped", tiny_model_dir)
    # within the second step, before the adapters change places, and within the third, after it
    train_interrupted(stopped, after=3)
    stopped["checkpoint"] |= {"resume": "auto"}
    train_interrupted(stopped, after=2)
    train(stopped)
    found = [json.dumps(without_clocks(metrics_of(tmp_path / name))) for name in ("straight", "stopped")]
    assert found[0] == found[1]
    models = [
        load_file(tmp_path / f / "run/adapter/adapter_model.safetensors") for f in ("straight", "stopped")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    # a command that reads the checkpoint has the fast adapter too
    assert main(["export", str(tmp_path / "stopped/run"), str(tmp_path / "out"), "--adapter"]) == 0
    exported = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(exported[name], models[0][name]) for name in exported)


def test_without_an_adapter_or_in_shards_it_is_refused_with_the_reason(tmp_path: Path, tiny_model_dir: Path):
    made = two_adapters(tmp_path, tiny_model_dir)
    said = "\n".join(describe(make_config(made), load_inputs(make_config(made))))
    assert "two, with learning rates lr and 0.05 lr" in said
    made["model"].pop("lora")
    with pytest.raises(ConfigError, match=r"trains two copies of the policy.*set model\.lora"):
        make_config(made)
    made["distributed"] = {"mode": "sharded"}
    with pytest.raises(ConfigError, match="trains two LoRA adapters, and adapters are not sharded"):
        make_config(made)
