"""Two ranks on the CPU do what one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.distributed import World, derive_seed
from tests.support import bandit_settings

ROOT = Path(__file__).parents[1]


def test_shares_add_up_to_the_total():
    for total in range(12):
        assert sum(World(r, 5, torch.device("cpu")).share(total) for r in range(5)) == total


def test_seeds_are_the_same_everywhere_and_differ_by_what_they_belong_to():
    assert derive_seed(0, "rollout/7") == 3823933015694781421
    seeds = {derive_seed(seed, f"rollout/{draw}") for seed in range(10) for draw in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**62 for s in seeds)


def launch(folder: Path, settings: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*command, str(ROOT / "rlhf" / "train.py"), str(config)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=clean_environment(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def clean_environment() -> dict[str, str]:
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.multi
@pytest.mark.parametrize("ahead", [0, 1])
def test_two_ranks_learn_what_one_rank_learns(tmp_path: Path, tiny_model_dir: Path, ahead: int):
    records: dict[int, list[dict[str, Any]]] = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        settings = bandit_settings(
            folder, tiny_model_dir, steps=4, algorithm={"name": "reinforce_pp"}, rollout={"ahead": ahead}
        )
        settings["algorithm"]["kl"] = {"coef": 0.01, "estimator": "k1", "placement": "reward"}
        records[ranks] = launch(folder, settings, ranks)
    assert len(records[1]) == len(records[2]) == 4
    for one, two in zip(records[1], records[2], strict=True):
        for name in ("reward/mean", "length/mean", "entropy", "grad_norm", "loss/policy", "kl/ref"):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name
        assert one["rollout/samples"] == two["rollout/samples"] == 64
