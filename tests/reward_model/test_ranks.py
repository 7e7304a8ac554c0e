"""Every kind on two ranks, replicated and in shards, learns what one rank learns and saves what is served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlhf.loop
from rlhf.config.reward_model import RewardModelConfig
from rlhf.distributed.world import world
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.rewards.model import RewardModel
from tests.ranks import together
from tests.support import changed, metrics_of, reward_model_settings


def rows() -> list[dict[str, Any]]:
    """Lines of unequal length that every kind can read; ranks cannot share out their tokens evenly."""
    found: list[dict[str, Any]] = []
    for i in range(9):
        good, bad = "a" * (1 + i % 4) + "b", "c" * (1 + i % 3)
        found.append(
            {
                "prompt": f"say {i}:" + " please" * (i % 3),
                "chosen": good,
                "rejected": bad,
                "completion": good if i % 2 else bad,
                "ratings": {"letters": i % 4, "even": None if i % 3 == 0 else i % 2},
                "completions": [good, bad, good + bad][: 2 + i % 2],
                "relevance": [2, 0, 1][: 2 + i % 2],
                "steps": ["a" * (1 + i % 3), "b", "aa"][: 1 + i % 3],
                "labels": [1, 0, 1][: 1 + i % 3],
            }
        )
    return found


SEVERAL = {"objectives": ["letters", "even"]}
KINDS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "ratings": SEVERAL,
    "gated": {**SEVERAL, "gate": {"width": 8, "layers": 1}},
    "ranking": {},
    "steps": {},
    "gap": {},
}


def settings_of(folder: Path, model_dir: str, kind: str, mode: str, size: int) -> dict[str, Any]:
    lines = folder / "lines.jsonl"
    # an eps of this size keeps AdamW from making large steps of the smallest gradients
    made = reward_model_settings(folder, Path(model_dir), steps=2, learner={"lr": 1e-3, "eps": 1e-2})
    data = {"train": str(lines), "eval": str(lines)} | ({"ratings": str(lines)} if kind == "gated" else {})
    changes = {
        "run_dir": str(folder / f"{kind}-{mode}-{size}" / "run"),
        "data": data,
        "score": {"kind": kind, **KINDS[kind]},
        # three examples at least, in microbatches of one or two: ranks have different numbers of passes
        "batch": {"tokens": 90, "low": 3},
        "learner": {"microbatch_tokens": 70},
        "distributed": {"mode": mode},
    }
    return changed(made, changes)


def train(settings: Mapping[str, Any]) -> None:
    RewardModelTrainer(RewardModelConfig.model_validate(settings)).run()


def train_all(folder: str, model_dir: str) -> None:
    """On this rank, in one process group for all runs."""
    with world() as here:

        def joined(timeout: float) -> Any:
            return nullcontext(here)

        rlhf.loop.world = joined
        for kind in KINDS:
            for mode in ("replicated", "sharded"):
                train(settings_of(Path(folder), model_dir, kind, mode, here.size))


@pytest.mark.multi
def test_two_ranks_learn_what_one_learns_and_serve_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    together(2, train_all, str(tmp_path), str(tiny_model_dir))
    for kind in KINDS:
        train(settings_of(tmp_path, str(tiny_model_dir), kind, "replicated", 1))
        one = tmp_path / f"{kind}-replicated-1"
        for mode in ("replicated", "sharded"):
            two = tmp_path / f"{kind}-{mode}-2"
            assert_same_metrics(metrics_of(two), metrics_of(one), f"{kind}, {mode}")
            assert_same_weights(two / "run" / "model", one / "run" / "model")
            got, want = (served(folder / "run" / "model", kind) for folder in (two, one))
            assert got == pytest.approx(want, abs=1e-5), f"{kind}, {mode}"
        assert len({round(score, 4) for score in want}) > 3, f"{kind}: scores that say nothing"


def assert_same_metrics(got: list[dict[str, Any]], want: list[dict[str, Any]], where: str) -> None:
    assert len(got) == len(want) == 2
    for one, two in zip(want, got, strict=True):
        names = [name for name in one if name.startswith("reward_model/") or name == "grad_norm"]
        assert "reward_model/loss" in names
        for name in names:
            assert two[name] == pytest.approx(one[name], abs=1e-5, rel=1e-5), (where, name)


def assert_same_weights(got: Path, want: Path) -> None:
    files = sorted(file.name for file in want.glob("*.safetensors"))
    assert files == sorted(file.name for file in got.glob("*.safetensors"))
    for file in files:
        mine, other = load_file(got / file), load_file(want / file)
        assert mine.keys() == other.keys()
        for name, weight in other.items():
            torch.testing.assert_close(mine[name], weight, rtol=1e-5, atol=1e-5)


def served(model: Path, kind: str) -> list[float]:
    lines = rows()
    reference = [row["rejected"] for row in lines] if kind == "gap" else None
    found: list[Any] = RewardModel(str(model))(
        [row["prompt"] for row in lines], [row["chosen"] for row in lines], reference=reference
    )
    return [x for score in found for x in (score.values() if isinstance(score, dict) else [score])]
