"""A reward model trained on four ratings gives a run its four objectives (multi-objective GRPO)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf.config.reward_model import RewardModelConfig
from rlhf.reward_model.trainer import RewardModelTrainer
from tests.support import bandit_settings, metrics_of, reward_model_settings, train

LABELS = ["politeness", "meaningfulness", "actionability", "safety"]
WEIGHTS = {"politeness": 0.25, "meaningfulness": 0.25, "actionability": 0.25, "safety": 1.0}


@pytest.fixture
def raters(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of a reward model that was trained on four kinds of ratings, some of them missing."""
    folder = tmp_path_factory.mktemp("raters")
    rows = [
        {
            "prompt": f"say {i}:",
            "completion": "a" * (i % 5) + "b",
            "ratings": {**dict.fromkeys(LABELS, float(i % 5)), "safety": None if i % 3 == 0 else 1.0},
        }
        for i in range(24)
    ]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {"kind": "ratings", "objectives": LABELS}
    settings = reward_model_settings(folder, tiny_model_dir, steps=3, score=score)
    RewardModelTrainer(RewardModelConfig.model_validate(settings)).run()
    return folder / "run" / "model"


def test_its_scores_are_objectives_with_weights_of_their_own(
    tmp_path: Path, tiny_model_dir: Path, raters: Path
) -> None:
    function = {
        "path": "reward_model",
        "params": {"model": str(raters), "transform": "sigmoid"},
        "batch": 16,
        "timeout": 60,
        "weights": WEIGHTS,
    }
    settings = bandit_settings(
        tmp_path,
        tiny_model_dir,
        steps=2,
        reward={"functions": [function], "success_objective": "safety"},
        algorithm={"name": "gdpo"},
    )
    train(settings)
    records = metrics_of(tmp_path)
    assert len(records) == 2
    for record in records:
        means = {name: record[f"reward/{name}"] for name in LABELS}
        assert all(0 < mean < 1 for mean in means.values())
        assert all(record[f"reward/std/{name}"] > 0 for name in LABELS)
        expected = math.fsum(WEIGHTS[name] * means[name] for name in LABELS)
        assert record["reward/mean"] == pytest.approx(expected)
        assert record["advantage/zero_fraction"] < 1
