"""Whole offline runs: without an engine, with prompt values, before rollouts; stopped and resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf import components as parts_module
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.describe import describe
from rlhf.trainer import Trainer
from tests.support import bandit_settings, metrics_of, train, without_clocks


def write_data(folder: Path, *, reward: bool = True, prompts: int = 20) -> None:
    """Four completions of each prompt: strings of eight letters, rewarded for the share of the letter a."""
    rng = random.Random(0)
    lines: list[str] = []
    for i in range(prompts):
        for share in (0.1, 0.3, 0.5, 0.9):
            text = "".join("a" if rng.random() < share else rng.choice("bcdefgh") for _ in range(7))
            row: dict[str, Any] = {"prompt": f"say {i}:", "completion": text}
            lines.append(json.dumps(row | ({"reward": text.count("a") / 7} if reward else {})))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "eval.jsonl").write_text("".join(f'{{"prompt": "say {i}:"}}\n' for i in range(30, 34)))


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that learns from data alone, with the rewards in the data, and never evaluates."""
    base = bandit_settings(folder, model)
    write_data(folder)
    base["data"] |= {"mode": "offline"}
    base["algorithm"] = {"name": "awr"}
    base["reward"] = {}
    base["learner"] |= {"lr": 1e-2}
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def no_engine(*_: Any, **__: Any) -> Any:
    raise AssertionError("a rollout engine was started")


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("awr", "groups"),
        ("awr_token", "completions"),
        ("a_lol", "priority"),
    ],
)
def test_an_offline_run_learns_without_any_engine(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, sampling: str
):
    monkeypatch.setattr(parts_module, "make_engine", no_engine)
    train(
        settings(
            tmp_path,
            tiny_model_dir,
            algorithm={"name": name},
            data={"sampling": sampling},
            prompt_value={"targets": "data", "lr": 1e-3},
            critic={"lr": 1e-3},
        )
    )
    records = metrics_of(tmp_path)
    assert len(records) == 12
    assert records[-1]["grad_norm"] > 0
    assert not any(name.startswith("mismatch/") for name in records[-1])
    assert records[-1]["entropy"] < records[0]["entropy"] - 0.5


def test_an_engine_is_started_for_an_evaluation_and_given_up_before_the_next_update(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[str] = []
    make = parts_module.make_engine

    def counted(*args: Any, **kwargs: Any) -> Any:
        started.append("engine")
        return make(*args, **kwargs)

    monkeypatch.setattr(parts_module, "make_engine", counted)
    reward = {"functions": [{"path": f"{tmp_path}/reward.py:share_of_a"}]}
    changes: dict[str, Any] = {"reward": reward, "data": {"eval": str(tmp_path / "eval.jsonl")}}
    train(settings(tmp_path, tiny_model_dir, steps=30, **changes))
    assert len(started) == 2
    before, after = json.loads((tmp_path / "run" / "eval.json").read_text())
    text = [sample["completion"] for sample in after["samples"]]
    assert (before["step"], after["step"]) == (0, 30)
    # the run learned to write a, and the evaluation samples with the learned weights
    assert (
        sum(t.count("a") for t in text) > 3 * sum(s["completion"].count("a") for s in before["samples"]) + 3
    )


LOGGED = """
import pathlib

def share_of_a(completions, **_):
    with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
        file.write("call\\n" * len(completions))
    return [text.count("a") / max(1, len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("parts", "changes", "calls"),
    [
        # every completion of the data, and one greedy completion of each prompt
        (
            ("offline", "prompt_value"),
            {"algorithm": {"name": "a_lol"}, "data": {"sampling": "priority", "reward_column": None}},
            80 + 20,
        ),
        (("balance",), {"algorithm": {"name": "awr", "divergence": 0.3}}, 0),
    ],
    ids=["scores-and-values", "temperatures"],
)
def test_what_is_done_before_the_first_step_is_not_done_again_by_a_resumed_run(
    tmp_path: Path, tiny_model_dir: Path, parts: tuple[str, ...], changes: dict[str, Any], calls: int
):
    folders = {name: tmp_path / name for name in ("straight", "stopped")}
    runs: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        folder.mkdir()
        runs[name] = settings(
            folder,
            tiny_model_dir,
            **changes,
            steps=6,
            prompt_value={"lr": 1e-3},
            reward={"functions": [{"path": f"{folder}/reward.py:share_of_a"}]},
            checkpoint={"every": 3, "export": False, "keep_last": 9},
        )
        (folder / "reward.py").write_text(LOGGED)
        write_data(folder, reward="offline" not in parts)
    train(runs["straight"])
    train(runs["stopped"] | {"steps": 3})
    checkpoint = folders["stopped"] / "run" / "checkpoints" / "step_000003" / "state.json"
    assert all(json.loads(checkpoint.read_text())[part] for part in parts)
    train(runs["stopped"] | {"checkpoint": {"resume": "auto", "export": False}})
    got, expected = (without_clocks(metrics_of(folders[name])) for name in ("stopped", "straight"))
    assert got == expected
    assert (0 < got[0]["offline/kept_fraction"] < 1) == ("prompt_value" in parts)
    log = folders["stopped"] / "calls"
    assert (log.read_text().count("call") if log.is_file() else 0) == calls


def test_one_config_starts_from_data_and_goes_on_with_rollouts(tmp_path: Path, tiny_model_dir: Path):
    changes: dict[str, Any] = {
        "reward": {"functions": [{"path": f"{tmp_path}/reward.py:share_of_a"}]},
        "data": {"mode": "offline_to_online", "offline_steps": 10},
        "steps": 22,
    }
    train(settings(tmp_path, tiny_model_dir, **changes))
    records = metrics_of(tmp_path)
    assert ["offline/kept_fraction" in r for r in records] == [True] * 10 + [False] * 12
    assert ["mismatch/k3" in r for r in records] == [False] * 10 + [True] * 12
    rewards = [r["reward/mean"] for r in records]
    # the rewards of the first ten steps are those of the data; an untrained policy gets 0.01
    assert rewards[10] > 0.05
    assert sum(rewards[-3:]) / 3 > 1.5 * rewards[10], rewards


def test_the_datas_completions_compete_with_the_policys_own(tmp_path: Path, tiny_model_dir: Path):
    changes: dict[str, Any] = {
        "reward": {"functions": [{"path": f"{tmp_path}/reward.py:share_of_a"}]},
        "algorithm": {"name": "best_of"},
        "data": {"mode": "offline_to_online", "mix": True},
    }
    train(settings(tmp_path, tiny_model_dir, **changes))
    records = metrics_of(tmp_path)
    # the metrics are those of the policy's own completions: 8 prompts x 8
    assert all(r["rollout/samples"] == 64 for r in records)
    assert records[-1]["reward/mean"] > 3 * max(records[0]["reward/mean"], 0.01)
    # at first the completions of the data are better, so most tokens learned from have no log-probs
    assert records[0]["advantage/zero_fraction"] == pytest.approx(1 - 1 / 12)


def test_replayed_rollouts_teach_and_survive_a_resume(tmp_path: Path, tiny_model_dir: Path):
    folders = {key: tmp_path / key for key in ("straight", "stopped")}
    records: list[list[dict[str, Any]]] = []
    for key, folder in folders.items():
        folder.mkdir()
        run = bandit_settings(folder, tiny_model_dir, steps=6, replay={"groups_per_step": 4, "max_age": 2})
        run["checkpoint"] |= {"every": 4, "keep_last": 9, "resume": "auto"}
        if key == "stopped":
            train(run | {"steps": 4})
        train(run)
        records.append(without_clocks(metrics_of(folder)))
    straight, stopped = records
    assert straight == stopped
    assert [r["replay/groups"] for r in straight] == [0, 4, 4, 4, 4, 4]
    assert all(1 <= r["replay/age"] <= r["replay/age_max"] <= 2 for r in straight[2:])
    # replayed tokens were sampled by an earlier policy than that of the step
    assert straight[-1]["mismatch/k3"] > 1e-5 > straight[0]["mismatch/k3"]


@pytest.mark.parametrize("name", ["a_lol", "awr_token"])
def test_imitation_raises_the_reward_of_the_policys_own_rollouts_too(
    tmp_path: Path, tiny_model_dir: Path, name: str
):
    more: dict[str, Any] = {"prompt_value": {"lr": 1e-3}, "critic": {"lr": 1e-3}}
    run = bandit_settings(tmp_path, tiny_model_dir, steps=12, **more)
    run["algorithm"] = {"name": name}
    train(run)
    rewards = [record["reward/mean"] for record in metrics_of(tmp_path)]
    assert sum(rewards[-3:]) / 3 > 2 * max(0.01, sum(rewards[:3]) / 3), rewards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "grpo"}}, "compares the policy with the one that sampled"),
        ({"algorithm": {"name": "awr", "mismatch": {"kind": "token_tis"}}}, "no mismatch can be corrected"),
        ({"data": {"sampling": "priority"}}, "take a baseline that is none or prompt_value"),
        ({"data": {"mix": True}}, "are for data.mode = offline_to_online"),
        ({"data": {"mode": "offline_to_online"}}, "set data.offline_steps, data.mix or both"),
        ({"data": {"mode": "online"}}, "reward.functions is empty"),
        ({"data": {"reward_column": None}}, "nothing gives completions a reward"),
        ({"algorithm": {"name": "a_lol"}}, "prompt_value.targets = data"),
        ({"budget": {"rule": "knapsack"}}, "has no rollouts to share out"),
        ({"replay": {"groups_per_step": 1}}, "replay.groups_per_step is for rollouts"),
        ({"rollout": {"ahead": 1}}, "data.mode = offline samples none"),
        ({"data": {"eval": "x.jsonl"}}, "is evaluated by them"),
        (
            {"algorithm": {"name": "awr", "divergence": 0.5}, "data": {"mode": "online"}},
            "divergence picks the temperature of a prompt",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_the_config_is_read(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_config(settings(tmp_path, tmp_path, **changes))


def test_replay_without_a_correction_is_refused(tmp_path: Path):
    run = bandit_settings(tmp_path, tmp_path, replay={"groups_per_step": 2})
    run["algorithm"] = {"name": "grpo", "mismatch": {"kind": "none"}}
    with pytest.raises(ConfigError, match="tokens of older policies"):
        make_config(run)


def test_check_says_what_a_run_from_data_will_do(tmp_path: Path, tiny_model_dir: Path):
    config = make_config(settings(tmp_path, tiny_model_dir))
    text = "\n".join(describe(config, Trainer(config).inputs))
    assert "rewards      column reward of the data\n" in text
    assert "in the data, 0 lines skipped" in text and "completions  80 of" in text
    assert "8 prompts with all their completions, from the data" in text
