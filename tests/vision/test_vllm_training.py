"""Runs with pictures, in prompts and in what an environment answers, whose completions come from vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_environment_runs import FILE, STOPS
from tests.rollout.vllm.support import needs_vllm
from tests.support import metrics_of, train
from tests.vision.support import HEADS, picture_settings
from tests.vision_models import save_tiny_vlm

pytestmark = needs_vllm


@pytest.mark.parametrize(
    ("name", "dtype", "bound"), [("vllm", "bfloat16", 0.01), ("vllm-server", "float32", 1e-6)]
)
def test_a_run_with_pictures(tmp_path: Path, name: str, dtype: str, bound: float) -> None:
    save_tiny_vlm(tmp_path / "model", "qwen2_5_vl", **HEADS)
    rollout = {"engine": name, "kv_cache_gib": 0.1}
    settings = picture_settings(tmp_path, tmp_path / "model", steps=2, rollout=rollout)
    settings["model"]["dtype"] = dtype
    settings["rollout"] |= {"max_completion_tokens": 60, "stop_token_ids": STOPS}
    settings["environment"] = {"path": f"{FILE}:Shows", "max_turns": 2, "workers": 1}
    train(settings)
    records = metrics_of(tmp_path)
    assert len(records) == 2
    assert all(record["turns/mean"] > 1.5 and record["turns/lost"] == 0 for record in records)
    assert max(record["mismatch/k3"] for record in records) < bound
