"""A run whose engine is vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.load import load_inputs
from tests.rollout.vllm.support import needs_vllm
from tests.support import bandit_settings, metrics_of, train

pytestmark = needs_vllm


def test_what_cannot_work_is_refused_at_once(tmp_path: Path, tiny_model: Any) -> None:
    def refused(world_size: int, **rollout: Any) -> None:
        settings = bandit_settings(tmp_path, tiny_model("llama-wide"), rollout=rollout)
        load_inputs(make_config(settings), world_size=world_size)

    with pytest.raises(ConfigError, match=r"are for servers: set rollout\.engine"):
        refused(1, engine="vllm", vllm={"replicas": 2})
    with pytest.raises(ConfigError, match=r"and there is no model\.lora"):
        refused(1, engine="vllm", vllm={"lora": "adapter"})


def test_training_from_a_server(tmp_path: Path, tiny_model: Any) -> None:
    rollout = {"engine": "vllm-server", "kv_cache_gib": 0.1}
    train(bandit_settings(tmp_path, tiny_model("llama-wide"), steps=3, rollout=rollout))
    records = metrics_of(tmp_path)
    assert len(records) == 3
    assert max(record["mismatch/k3"] for record in records) < 1e-6


def test_training_learns(tmp_path: Path, tiny_model: Any) -> None:
    rollout = {"engine": "vllm", "kv_cache_gib": 0.1}
    train(bandit_settings(tmp_path, tiny_model("llama-wide"), rollout=rollout))
    records = metrics_of(tmp_path)
    assert records[-1]["reward/mean"] > 2 * records[0]["reward/mean"]
    assert max(record["mismatch/k3"] for record in records) < 1e-6


def test_a_server_samples_from_an_adapter_that_is_sent_by_itself(tmp_path: Path, tiny_model: Any) -> None:
    pytest.importorskip("peft")
    rollout = {"engine": "vllm-server", "kv_cache_gib": 0.1, "vllm": {"lora": "adapter"}}
    algorithm = {"name": "grpo", "kl": {"coef": 1e-3}}
    settings = bandit_settings(
        tmp_path, tiny_model("llama-wide"), steps=4, rollout=rollout, algorithm=algorithm
    )
    train(settings | {"model": {**settings["model"], "lora": {"rank": 8}}, "learner": {"lr": 3e-2}})
    records = metrics_of(tmp_path)
    # four updates at a large rate: the adapter is no longer nothing
    assert records[-1]["kl/ref"] > 1e-3
    assert max(record["mismatch/k3"] for record in records) < 1e-6
