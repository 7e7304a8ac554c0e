"""A run that version 0.1.0 left in the middle of a step is resumed, and makes the figures it made there.

Its checkpoint has an experience with truncated sampling whose updates are half done, and a batch that was
sampled ahead. It was written before fields and files had the names of today.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import bandit_settings, metrics_of, train

RUN = Path(__file__).parents[1] / "golden" / "earlier_run"
REWARD = """
def lower_case(completions, **_):
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in completions]
"""


def settings(folder: Path, model: Path) -> dict[str, Any]:
    made = bandit_settings(
        folder,
        model,
        steps=4,
        learner={"epochs": 2, "minibatches": 2, "lr": 1e-3},
        critic={"lr": 1e-3, "trunk": "policy"},
        rollout={
            "prompts_per_step": 4,
            "group_size": 4,
            "max_completion_tokens": 6,
            "top_k": 60,
            "ahead": 1,
        },
        reward={"functions": [{"path": f"{folder}/reward.py:lower_case"}], "success_threshold": 0.5},
        data={"eval": str(folder / "train.jsonl")},
        eval={"every": 2, "samples": 1, "max_prompts": 4},
        monitor={"samples_per_step": 1},
        checkpoint={"resume": "auto"},
    )
    made["algorithm"] = {"name": "vapo", "critic": {"warmup_steps": 0}, "mismatch": {"kind": "token_tis"}}
    (folder / "reward.py").write_text(REWARD)
    return made


def test_a_run_of_version_0_1_0_goes_on_within_its_step(tmp_path: Path, tiny_model_dir: Path):
    shutil.copytree(RUN / "run", tmp_path / "run")
    before = len(metrics_of(tmp_path))
    train(settings(tmp_path, tiny_model_dir))
    records, golden = metrics_of(tmp_path), json.loads((RUN / "metrics.json").read_text())
    assert before == 1 and len(records) == 4
    for name, values in golden.items():
        assert [record[name] for record in records] == pytest.approx(values, rel=1e-3, abs=1e-5), name
