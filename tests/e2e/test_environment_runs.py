"""Whole runs with an environment: what is learned, lost and recorded, and exact resumption."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.rewards.workers.pool import RewardError
from tests.environments.my_environments import spoken
from tests.faults.processes import Fault, launch
from tests.support import bandit_settings, metrics_of, train, without_clocks

FILE = Path(__file__).parents[1] / "environments" / "my_environments.py"
# of 99 tokens these end a turn, so that a random model's turns are short
STOPS = list(range(20, 36))


def settings(folder: Path, model: Path, name: str = "Echo", **changes: Any) -> dict[str, Any]:
    base = bandit_settings(
        folder,
        model,
        steps=3,
        environment={"path": f"{FILE}:{name}", "max_turns": 3, "workers": 1},
        reward={"functions": []},
        rollout={
            "prompts_per_step": 4,
            "group_size": 4,
            "max_completion_tokens": 120,
            "stop_token_ids": STOPS,
        },
        monitor={"sinks": [], "samples_per_step": 4},
    )
    rows = [{"prompt": [{"role": "user", "content": f"say {i}:"}]} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base["data"]["max_prompt_tokens"] = 64
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def test_a_run_learns_from_episodes_and_shows_them(tmp_path: Path, tiny_model_dir: Path) -> None:
    functions = [{"path": f"{FILE}:heard", "weight": 0.0}]
    chosen = settings(tmp_path, tiny_model_dir, reward={"functions": functions})
    said = "\n".join(describe(make_config(chosen), load_inputs(make_config(chosen))))
    assert "Echo: answers in its own words; 40 prompts; at most 3 turns" in said
    train(chosen)
    metrics = metrics_of(tmp_path)
    assert [m["reward/heard"] for m in metrics] == [m["turns/mean"] for m in metrics]
    assert all(1 < m["turns/mean"] <= 3 and m["length/observed"] > 0 for m in metrics)
    assert all(m["turns/lost"] == 0 and m["reward/mean"] == m["reward/Echo"] for m in metrics)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    groups = [json.loads(line) for line in lines]
    # the group's prompt has what reset has put behind it
    assert all(group["prompt"][-1]["content"][-2:] in (":x", ":y", ":z") for group in groups)
    completion = next(c for group in groups for c in group["completions"] if len(c["messages"]) > 1)
    own = sum(length for length, learned in completion["parts"] if learned)
    assert own == completion["num_tokens"] < len(completion["tokens"])
    assert [m["role"] for m in completion["messages"]][:2] == ["assistant", "user"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert '<div class="observed"><small>user</small>' in report


def test_dpo_learns_from_pairs_of_episodes(tmp_path: Path, tiny_model_dir: Path) -> None:
    chosen = settings(
        tmp_path,
        tiny_model_dir,
        steps=2,
        algorithm={"name": "dpo", "beta": 0.1},
        pairs={"rule": "first_two"},
        rollout={"group_size": 2},
    )
    train(chosen)
    first, second = metrics_of(tmp_path)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    groups = [group for group in map(json.loads, lines) if group["step"] == 1]
    # episodes with the same reward are no pair, and not learned from
    pairs = [sorted(group["completions"], key=lambda one: one["reward"]) for group in groups]
    assert 0 < len(pairs) == first["pairs/groups"]
    assert all(worse["reward"] < better["reward"] for worse, better in pairs)
    # the pair is of whole episodes: all turns of the policy count, and nothing that it observed
    for place, name in enumerate(("rejected", "chosen")):
        own = [sum(length for length, learned in pair[place]["parts"] if learned) for pair in pairs]
        assert first[f"pairs/{name}_tokens"] == sum(own) / len(own)
        assert all(len(pair[place]["messages"]) > 1 for pair in pairs)
    # log 2 before anything was learned; then the policy has moved
    assert first["pairs/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["kl/ref"] == 0 < second["kl/ref"]


@pytest.mark.multi
def test_ranks_whole_or_sharded_learn_from_episodes_what_one_does(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """By turn: counts of earlier and last turns, and the normalisation of each part, are of all ranks."""
    runs: list[list[dict[str, Any]]] = []
    for ranks, mode in ((1, "replicated"), (2, "replicated"), (2, "sharded")):
        folder = tmp_path / f"{ranks}{mode}"
        folder.mkdir()
        chosen = settings(
            folder,
            tiny_model_dir,
            steps=2,
            algorithm={"name": "dtpo", "tool_objectives": ["brief"]},
            environment={"params": {"ends": ascii_lowercase}},
            reward={"functions": [{"path": f"{FILE}:brief", "weight": 0.1}]},
            # AdamW makes steps of the same size for a gradient that is only rounding error as for a large one
            learner={"lr": 1e-3, "eps": 1e-3, "minibatches": 2},
            distributed={"mode": mode},
        )
        for ended in launch(chosen, folder / "log", ranks=ranks):
            assert ended.code == 0, ended.said
        runs.append(metrics_of(folder))
    one, *others = runs
    assert all(1.2 < step["turns/mean"] < 2.8 and step["grad_norm"] > 0.1 for step in one)
    for other in others:
        for alone, both in zip(one, other, strict=True):
            for name in (
                "loss/policy",
                "grad_norm",
                "reward/mean",
                "reward/brief",
                "turns/mean",
                "length/mean",
            ):
                assert both[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-5), (alone["step"], name)


def test_dpo_learns_from_a_judge_of_episodes(tmp_path: Path, tiny_model_dir: Path) -> None:
    judge = {"path": f"{FILE}:longer", "workers": 1, "batch": 64}
    chosen = settings(
        tmp_path,
        tiny_model_dir,
        "Unrated",
        steps=1,
        algorithm={"name": "dpo"},
        reward={"functions": [], "preference": judge},
    )
    said = "\n".join(describe(make_config(chosen), load_inputs(make_config(chosen))))
    assert "longer: 4 prompts x 6 duels x 2 orders = 48 calls a step" in said
    train(chosen)
    [step] = metrics_of(tmp_path)
    assert step["duels/asked"] > 0 == step["duels/failed"]
    assert step["pairs/groups"] > 0 and step["reward/mean"] == pytest.approx(0.5)
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        better, worse = sorted(json.loads(line)["completions"], key=lambda one: -one["reward"])
        assert better["reward"] > worse["reward"] and spoken(better["messages"]) > spoken(worse["messages"])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Unrated", {}, "nothing gives episodes a reward: Unrated has no get_reward"),
        (
            "Echo",
            {"reward": {"preference": {"path": f"{FILE}:longer"}}},
            "get_reward of the environment only labels",
        ),
    ],
)
def test_what_rewards_no_episode_is_refused(
    tmp_path: Path, tiny_model_dir: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    config = make_config(settings(tmp_path, tiny_model_dir, name, **changes))
    with pytest.raises(ConfigError, match=said):
        load_inputs(config)


def test_an_evaluation_plays_the_same_environment(tmp_path: Path, tiny_model_dir: Path) -> None:
    chosen = settings(tmp_path, tiny_model_dir, checkpoint={"export": True}, steps=1)
    (tmp_path / "eval.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    train(chosen)
    out = tmp_path / "measured.json"
    asked = [str(tmp_path / "run"), "--data", str(tmp_path / "eval.jsonl"), "--out", str(out)]
    assert main(["eval", *asked, "eval.samples=1", "eval.max_prompts=4"]) == 0
    records = json.loads(out.read_text())["records"]
    assert len(records) == 4 and all("Echo" in c["objectives"] for r in records for c in r["completions"])


def test_a_broken_environment_costs_its_episodes_until_they_are_too_many(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    chosen = settings(tmp_path, tiny_model_dir, "Fragile", reward={"functions": [], "max_failed_share": 1.0})
    train(chosen)
    assert all(m["turns/lost"] == m["reward/failed"] > 0 for m in metrics_of(tmp_path))
    chosen["reward"]["max_failed_share"] = 0.01
    chosen["run_dir"] = str(tmp_path / "second")
    with pytest.raises(RewardError, match=r"episodes were lost .*Fragile.*it broke"):
        train(chosen)


def test_a_run_killed_within_an_episode_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    kept = {"every": 1, "export": False, "resume": "auto"}
    whole = settings(tmp_path, tiny_model_dir, checkpoint=kept)
    train(whole)
    cut = {**whole, "run_dir": str(tmp_path / "cut" / "run")}
    fault = Fault("rlhf.collect.episodes:_Run._observe", 30)
    [ended] = launch(cut, tmp_path / "log", fault=fault)
    assert ended.code == -signal.SIGKILL, ended.said
    train(cut)
    assert without_clocks(metrics_of(tmp_path / "cut")) == without_clocks(metrics_of(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"mode": "offline"}}, "nothing is sampled that an environment could answer"),
        ({"environment": {"path": f"{FILE}:Missing"}}, "Missing"),
    ],
)
def test_what_cannot_run_is_refused(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_inputs(make_config(settings(tmp_path, tiny_model_dir, **changes)))


def test_prompts_of_plain_text_are_refused_with_their_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    chosen = settings(tmp_path, tiny_model_dir)
    (tmp_path / "train.jsonl").write_text('{"prompt": "say it"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:1: the prompt is plain text"):
        load_inputs(make_config(chosen))
