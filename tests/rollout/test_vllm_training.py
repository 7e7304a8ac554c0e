"""A run whose engine is vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import bandit_settings, metrics_of, train

from .vllm_support import needs_vllm

pytestmark = needs_vllm


def test_training_learns(tmp_path: Path, tiny_model: Any) -> None:
    rollout = {"engine": "vllm", "kv_cache_gib": 0.1}
    train(bandit_settings(tmp_path, tiny_model("llama-wide"), rollout=rollout))
    records = metrics_of(tmp_path)
    assert records[-1]["reward/mean"] > 2 * records[0]["reward/mean"]
    assert max(record["mismatch/k3"] for record in records) < 1e-6
