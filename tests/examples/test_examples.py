"""What stands in examples/ works: each config trains, on a tiny model and with less of everything."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.load import load_config
from rlhf.rewards.plugin import RewardSpec, load_reward
from rlhf.trainer import Trainer

ROOT = Path(__file__).parents[2]
SMALL = ["model.dtype=float32", "steps=1", "rollout.prompts_per_step=2", "rollout.group_size=2"]
SMALL += ["rollout.max_completion_tokens=4", "data.max_prompt_tokens=128", "learner.microbatch_tokens=512"]
SMALL += ["eval={samples: 1, max_prompts: 2}", "monitor.sinks=[]", "checkpoint.export=false"]


def run(config: str, folder: Path, model: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of each step."""
    changes = [*SMALL, f"model.path={model}", f"run_dir={folder}/run", *overrides]
    Trainer(load_config(ROOT / config, changes)).run()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def by_length(folder: Path) -> list[str]:
    """A reward that even a random model's completions differ in."""
    code = "def length(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    (folder / "reward.py").write_text(code)
    return [f"reward.functions=[{{path: '{folder}/reward.py:length'}}]", "rollout.group_size=8"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_own_rewards_are_objectives_of_their_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    (step,) = run("examples/own_reward/config.yaml", tmp_path, tiny_model_dir)
    assert {"reward/short", "reward/plain"} <= step.keys()


def test_an_own_reward_by_hand() -> None:
    close = load_reward(RewardSpec("examples/own_reward/reward.py:close", params={"scale": 3.0}))
    answers = [[{"role": "assistant", "content": text}] for text in ("8", "It is 11.", "no idea")]
    assert close({"completions": answers, "answer": [8, 8, 8]}) == [1.0, 0.5, 0.0]


def test_own_data_in_each_of_its_forms(tmp_path: Path, tiny_model_dir: Path) -> None:
    made = runpy.run_path("examples/own_dataset/make_data.py")
    made["main"](tmp_path)
    assert [made["roman"](n) for n in (4, 9, 14, 49, 58)] == ["IV", "IX", "XIV", "XLIX", "LVIII"]
    data = [f"data.train={tmp_path}/all", f"data.eval={tmp_path}/eval.parquet"]
    (step,) = run("examples/own_dataset/config.yaml", tmp_path, tiny_model_dir, *data)
    assert step["rollout/samples"] == 4
    Trainer(
        load_config(
            ROOT / "examples/own_dataset/config.yaml",
            [
                f"model.path={tiny_model_dir}",
                f"data.train={tmp_path}/train.jsonl",
                "data.eval=null",
                "data.max_prompt_tokens=128",
            ],
        )
    ).inputs.rewards.close()


def test_an_own_algorithm_moves_the_policy(tmp_path: Path, tiny_model_dir: Path) -> None:
    (step,) = run("examples/own_algorithm/config.yaml", tmp_path, tiny_model_dir, *by_length(tmp_path))
    assert step["own/distance"] > 0 and step["grad_norm"] > 0


def test_the_rank_advantage_by_hand() -> None:
    beaten = runpy.run_path("examples/own_algorithm/algorithm.py")["beaten"]
    rewards, group = torch.tensor([1.0, 5.0, 900.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    assert beaten(rewards, group).tolist() == pytest.approx([-2 / 3, 0.0, 2 / 3, 0.0, 0.0])


def test_an_own_engine_agrees_with_the_learner(tmp_path: Path, tiny_model_dir: Path) -> None:
    (step,) = run("examples/own_engine/config.yaml", tmp_path, tiny_model_dir, *by_length(tmp_path))
    assert 0 <= step["mismatch/k3"] < 1e-8 and step["rollout/samples"] == 16


def test_ten_lines_of_python_train(tmp_path: Path, tiny_model_dir: Path) -> None:
    script = ROOT / "examples" / "library.py"
    code = [line for line in script.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 10
    changes = [*SMALL, f"model.path={tiny_model_dir}", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, str(script), *changes],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").is_file() and "1 steps" in done.stdout


def test_every_example_stands_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    entries = {p.name for p in (ROOT / "examples").iterdir() if p.is_dir() or p.suffix == ".py"} - {
        "__pycache__"
    }
    listed = {target.split("/")[0] for target in re.findall(r"\]\(([^)]+)\)", table)}
    assert entries <= listed, f"examples/README.md has no row for {sorted(entries - listed)}"


def test_the_package_offers_the_trainer_without_importing_it() -> None:
    script = """
import sys
import rlhf, rlhf.rewards.judges.chat
# a worker that asks a service must not wait for it either
assert "torch" not in sys.modules and not hasattr(rlhf, "Trainre")
from rlhf import Trainer, load_config
import rlhf.config.run, rlhf.trainer
assert Trainer is rlhf.trainer.Trainer and load_config is rlhf.config.load.load_config
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
