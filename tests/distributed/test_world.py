"""Two ranks on the CPU learn what one rank learns; shares and seeds of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.distributed.world import World, derive_seed
from tests.support import bandit_settings, metrics_of, train

ROOT = Path(__file__).parents[2]


def test_shares_add_up_to_the_total():
    for total in range(12):
        assert sum(World(r, 5, torch.device("cpu")).share(total) for r in range(5)) == total


def test_seeds_are_the_same_everywhere_and_differ_by_what_they_belong_to():
    assert derive_seed(0, "rollout/7") == 3823933015694781421
    seeds = {derive_seed(seed, f"rollout/{draw}") for seed in range(10) for draw in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**62 for s in seeds)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# --multi_gpu asks for several processes; without a GPU they run on the CPU
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]


def launch(folder: Path, settings: dict[str, Any], command: list[str]) -> list[dict[str, Any]]:
    """The records of a run that `python -m command` starts."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    result = subprocess.run(
        [sys.executable, "-m", *command, str(ROOT / "rlhf" / "train.py"), str(config)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=clean_environment(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return metrics_of(folder)


def clean_environment() -> dict[str, str]:
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.multi
@pytest.mark.parametrize(
    ("ahead", "command", "mode"),
    [(0, TORCHRUN, "replicated"), (1, ACCELERATE, "replicated"), (0, ACCELERATE, "sharded")],
    ids=["torchrun", "accelerate", "accelerate-sharded"],
)
def test_two_ranks_learn_what_one_rank_learns(
    tmp_path: Path, tiny_model_dir: Path, ahead: int, command: list[str], mode: str
):
    records: list[list[dict[str, Any]]] = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        settings = bandit_settings(
            folder, tiny_model_dir, steps=4, algorithm={"name": "reinforce_pp"}, rollout={"ahead": ahead}
        )
        settings["distributed"] = {"mode": mode}
        settings["algorithm"]["kl"] = {"coef": 0.01, "estimator": "k1", "placement": "reward"}
        if ranks == 1:
            train(settings)
            records.append(metrics_of(folder))
        else:
            records.append(launch(folder, settings, command))
    assert len(records[0]) == len(records[1]) == 4
    for one, two in zip(*records, strict=True):
        for name in ("reward/mean", "length/mean", "entropy", "grad_norm", "loss/policy", "kl/ref"):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name
        assert one["rollout/samples"] == two["rollout/samples"] == 64
