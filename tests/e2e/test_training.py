"""Whole runs of a two-layer model: each algorithm raises the reward; a stopped run continues where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.algos.imitation import IMITATION
from rlhf.algos.preference.online_table import ONLINE_PREFERENCE
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.algos.table import ALGORITHMS
from rlhf.checkpoints.store import load
from tests.support import bandit_settings, metrics_of, train, train_interrupted, without_clocks

REQUIRED = {
    "cispo": {"clip_high": 5.0},
    "dtpo": {"tool_objectives": ["share_of_a"]},
    "vapo": {"critic": {"warmup_steps": 2}},
}


# test_offline_runs.py, test_preference_runs.py, test_sampler_runs.py and test_twin_runs.py have the others
OTHERS = IMITATION | PREFERENCE | ONLINE_PREFERENCE | TWO_ROLES


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in OTHERS])
def test_every_algorithm_raises_the_reward(tmp_path: Path, tiny_model_dir: Path, name: str):
    algorithm = {"name": name, "kl": {"coef": 0.0}} | REQUIRED.get(name, {})
    settings = bandit_settings(tmp_path, tiny_model_dir, critic={"lr": 1e-3})
    settings["algorithm"] = algorithm
    if name == "grpo_ps":
        settings["reward"]["functions"][0]["path"] = f"{tmp_path}/reward.py:each_a"
    train(settings)
    rewards = [record["reward/mean"] for record in metrics_of(tmp_path)]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > 4 * max(0.01, sum(rewards[:3]) / 3), rewards


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dtype": "bfloat16"}},
        {"model": {"packing": "padded", "gradient_checkpointing": True}},
        {"rollout": {"engine": "hf"}},
        {"rollout": {"ahead": 1}},
        {"learner": {"epochs": 2, "minibatches": 2}},
        {"algorithm": {"name": "grpo", "kl": {"coef": 0.01, "estimator": "exact"}}},
        {"algorithm": {"name": "rloo", "kl": {"coef": 0.01, "estimator": "k1", "placement": "reward"}}},
        {"budget": {"rule": "knapsack", "high": 32}, "reward": {"success_threshold": 0.1}},
        {"algorithm": {"name": "grpo", "kl": {"coef": 0.01, "target": 0.05, "horizon": 100}}},
    ],
    ids=[
        "bfloat16",
        "padded-checkpointing",
        "hf-engine",
        "ahead",
        "inner-epochs",
        "exact-kl",
        "kl-in-reward",
        "knapsack",
        "adaptive-kl",
    ],
)
def test_the_other_paths_raise_the_reward_too(tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any]):
    train(bandit_settings(tmp_path, tiny_model_dir, **changes))
    rewards = [record["reward/mean"] for record in metrics_of(tmp_path)]
    assert sum(rewards[-3:]) / 3 > 3 * max(0.01, sum(rewards[:3]) / 3), rewards


INTERRUPTS = """
import os, pathlib, signal

TRAINER = {trainer}

def share_of_a(completions, trainer_state, **_):
    marker = pathlib.Path(__file__).with_name("interrupted")
    if trainer_state.global_step == 3 and marker.exists():
        marker.unlink()
        os.kill(TRAINER, signal.SIGINT)
    return [text.count("a") / max(1, len(text)) for text in completions]
"""


@pytest.mark.parametrize(("updates", "ahead"), [(1, 0), (2, 0), (2, 1)])
def test_a_run_stopped_by_ctrl_c_and_resumed_equals_one_never_stopped(
    tmp_path: Path, tiny_model_dir: Path, updates: int, ahead: int
):
    folders = {name: tmp_path / name for name in ("stopped", "straight")}
    runs: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        folder.mkdir()
        runs[name] = bandit_settings(
            folder,
            tiny_model_dir,
            steps=7,
            learner={"minibatches": updates},
            rollout={"ahead": ahead},
            data={"eval": str(folder / "train.jsonl")},
        )
        (folder / "reward.py").write_text(INTERRUPTS.format(trainer=os.getpid()))
    (folders["stopped"] / "interrupted").touch()
    train(runs["straight"])
    train(runs["stopped"])
    # a batch that is sampled ahead is scored during the update before it
    assert len(metrics_of(folders["stopped"])) in ((2, 3) if ahead else (3,))
    train(runs["stopped"] | {"checkpoint": {"resume": "auto", "export": True}})
    straight, stopped = (without_clocks(metrics_of(f)) for f in (folders["straight"], folders["stopped"]))
    assert stopped == straight
    evaluations = [json.loads((f / "run" / "eval.json").read_text()) for f in folders.values()]
    assert evaluations[0] == evaluations[1] and [e["step"] for e in evaluations[0]] == [0, 7]
    exported = AutoModelForCausalLM.from_pretrained(folders["stopped"] / "run" / "model")
    assert exported.config.num_hidden_layers == 2


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_a_run_stopped_in_the_middle_of_its_buffer_goes_on_with_the_next_update(
    tmp_path: Path, tiny_model_dir: Path, trunk: str
):
    texts = [{"text": "b" * (2 + i)} for i in range(5)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    runs: dict[str, dict[str, Any]] = {}
    for name in ("stopped", "straight"):
        (tmp_path / name).mkdir()
        runs[name] = bandit_settings(
            tmp_path / name,
            tiny_model_dir,
            steps=4,
            critic={"trunk": trunk, "lr": 1e-3},
            learner={"epochs": 2, "minibatches": 2},
            monitor={"samples_per_step": 1},
            ptx={"path": str(tmp_path / "texts.jsonl"), "coef": 0.1, "samples": 2},
        )
        kl = {"target": 0.01, "horizon": 50}
        runs[name]["algorithm"] = {"name": "ppo_max", "kl": kl, "critic": {"warmup_steps": 1}}
    train(runs["straight"])
    train_interrupted(runs["stopped"], after=11)
    checkpoints = tmp_path / "stopped" / "run" / "checkpoints"
    state = json.loads((checkpoints / "step_000002" / "state.json").read_text())
    assert (state["buffer"]["filled"], state["buffer"]["updates"]) == (True, 3)
    assert state["reward_scaler"]["count"] == 3 * 64
    train(runs["stopped"] | {"checkpoint": {"resume": "auto", "export": False}})
    straight, stopped = (without_clocks(metrics_of(tmp_path / name)) for name in ("straight", "stopped"))
    assert stopped == straight and len(stopped) == 4
    assert [record["critic/warmup"] for record in stopped] == [1.0, 0.0, 0.0, 0.0]
    folders = [tmp_path / name / "run" for name in ("straight", "stopped")]
    samples = [(folder / "samples.jsonl").read_text() for folder in folders]
    assert samples[0] == samples[1] and samples[0].count('"entropy"') > 4 * 4
    last = [load(folder / "checkpoints" / "step_000004", device="cpu") for folder in folders]
    assert last[0].state == last[1].state
    for file, tensors in last[0].tensors.items():
        assert all(torch.equal(tensor, last[1].tensors[file][key]) for key, tensor in tensors.items()), file
    assert {"policy.optimizer", "critic.model", "critic.optimizer"} <= last[0].tensors.keys()


def test_a_step_without_any_token_to_learn_from_leaves_the_kl_coefficient_alone(
    tmp_path: Path, tiny_model_dir: Path
):
    kl = {"coef": 0.01, "target": 0.05, "horizon": 100}
    settings = bandit_settings(tmp_path, tiny_model_dir, steps=3, rollout={"max_completion_tokens": 2})
    settings["algorithm"] = {
        "name": "dapo",
        "drop_truncated": True,
        "refill": 0,
        "overlong_cache": 0,
        "kl": kl,
    }
    train(settings)
    assert next(record["length/truncated"] for record in metrics_of(tmp_path)) > 0.5
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_000003" / "state.json").read_text())
    assert 0 < state["kl"]["value"] < 1


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path: Path, tiny_model_dir: Path):
    results: list[list[dict[str, Any]]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        train(bandit_settings(folder, tiny_model_dir, steps=3, seed=seed))
        results.append(without_clocks(metrics_of(folder)))
    assert results[0] == results[1] != results[2]
