"""Online DPO with a judge and no reward function: it learns, says what it asks, refuses what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.trainer import Trainer
from tests.e2e.test_preference_runs import write_pairs
from tests.faults.processes import Fault, launch
from tests.support import bandit_settings, metrics_of, without_clocks

JUDGE = f"{Path(__file__).parents[1]}/rewards/my_judges.py:more_a"


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    made = bandit_settings(folder, model)
    functions = made["reward"]["functions"]
    made |= {
        "algorithm": {"name": "dpo"},
        "reward": {"preference": {"path": JUDGE, "workers": 1, "batch": 64}},
    }
    made["rollout"] |= {"group_size": 4}
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(made.get(key), dict) else value
    if made["reward"].get("functions") == "share_of_a":
        made["reward"]["functions"] = functions
    return made


def test_a_policy_learns_from_a_judge_alone(tmp_path: Path, tiny_model_dir: Path):
    Trainer(make_config(settings(tmp_path, tiny_model_dir, steps=2))).run()
    steps = metrics_of(tmp_path)
    for step in steps:
        # 8 prompts of 4 completions: 6 duels each, if all differ
        assert 40 <= step["duels/asked"] <= 48 and step["duels/failed"] == 0.0
        # this judge sees no place
        assert step["duels/first"] == 0.5 and step["duels/disagree"] == 0.0
        assert step["reward/mean"] == step["reward/more_a"] == pytest.approx(0.5)
        assert step["pairs/groups"] > 0 and step["pairs/probability"] == 1.0
    assert steps[-1]["pairs/chosen_logratio"] > steps[-1]["pairs/rejected_logratio"]


def test_a_run_that_was_killed_in_a_duel_goes_on_as_if_it_had_not_been(tmp_path: Path, tiny_model_dir: Path):
    """Samples of policy and iterate are compared by the judge, whose answers are the labels."""
    files: list[str] = []
    for name, fault in (
        ("straight", None),
        ("killed", Fault("rlhf.rewards.judges.duels:DuelBatch.arguments", 5)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        made = settings(
            folder,
            tiny_model_dir,
            pairs={"rule": "all", "labels": "preference"},
            iteration={"steps": 2},
            checkpoint={"export": False, "every": 1, "resume": "auto"},
            steps=4,
        )
        made["reward"]["preference"]["batch"] = 8
        made["rollout"] |= {"prompts_per_step": 2, "samplers": [{"n": 2}, {"source": "iterate", "n": 2}]}
        [ended] = launch(made, folder / "log", fault=fault)
        if fault is not None:
            assert ended.code == -9, ended.said
            [ended] = launch(made, folder / "again")
        assert ended.code == 0, ended.said
        steps = metrics_of(folder)
        assert all(step["duels/asked"] > 0 for step in steps)
        files.append(json.dumps(without_clocks(steps)))
    assert files[0] == files[1]


def test_check_says_how_often_the_judge_is_called(tmp_path: Path, tiny_model_dir: Path):
    def told(**changes: Any) -> str:
        config = make_config(settings(tmp_path, tiny_model_dir, **changes))
        inputs = load_inputs(config)
        inputs.rewards.close()
        return "\n".join(describe(config, inputs))

    text = told()
    assert "more_a: 8 prompts x 6 duels x 2 orders = 96 calls a step" in text
    assert "rewards      mean win rate of a completion against the others of its prompt" in text
    assert "held-out prompts are not sampled: the judge has nothing to compare there" in text
    assert "more_a: 8 prompts x 1 duels x 2 orders = 16 calls a step" in told(pairs={"rule": "first_two"})


def test_held_out_prompts_cannot_be_judged_but_held_out_pairs_are_compared(
    tmp_path: Path, tiny_model_dir: Path
):
    made = settings(tmp_path, tiny_model_dir)
    made["data"]["eval"] = made["data"]["train"]
    with pytest.raises(
        ConfigError, match=r"reward\.preference has nothing to compare them with: give reward"
    ):
        load_inputs(make_config(made))
    write_pairs(tmp_path / "pairs.jsonl", seed=1, count=4)
    made["data"]["eval"] = str(tmp_path / "pairs.jsonl")
    inputs = load_inputs(make_config(made))
    inputs.rewards.close()
    assert inputs.eval is None and inputs.eval_pairs is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": {"preference": None}, "pairs": {"labels": "preference"}}, "but there is no judge"),
        ({"data": {"mode": "offline"}}, "sampled together, but data.mode = offline is set"),
        ({"rollout": {"group_size": 1}}, "reward.preference compares completions of a prompt: it needs two"),
        ({"reward": {"functions": "share_of_a"}}, "pairs.labels is auto: set it to preference"),
        (
            {"reward": {"functions": "share_of_a"}, "algorithm": {"name": "grpo"}},
            "only labels pairs, and grpo has none",
        ),
        ({"reward": {"success_objective": "more_a"}}, "its mean over a group is always about 1/2"),
        (
            {"budget": {"rule": "knapsack", "low": 1, "high": 8}},
            "budget.rule is knapsack, which goes by correct",
        ),
        (
            {"reward": {"preference": {"path": JUDGE, "weight": 2.0}}},
            "unknown setting reward.preference.weight",
        ),
    ],
)
def test_settings_without_sense_are_refused(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], said: str
):
    with pytest.raises(ConfigError, match=said):
        make_config(settings(tmp_path, tiny_model_dir, **changes))
