"""Lagrange multipliers of constraints: by hand, over several ranks, and in a run with a bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.load import make_config
from rlhf.config.reward import ConstraintConfig
from rlhf.config.section import ConfigError
from rlhf.distributed.world import World
from rlhf.metrics import Max
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.rewards.constraints import Constraints
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.rewards.workers.pool import RewardError, WorkerPool
from rlhf.types import Group, Prompt
from tests.support import ALONE, bandit_settings, metrics_of, train, trajectory, without_clocks

TWO = """
def share_of_a(completions, **_):
    return [text.count("a") / max(1, len(text)) for text in completions]

def share_of_b(completions, **_):
    return [text.count("b") / max(1, len(text)) for text in completions]
"""


def constraint(objective: str, **settings: Any) -> ConstraintConfig:
    return ConstraintConfig.model_validate({"objective": objective, "rate": 2.0, **settings})


def scored(*values: float, name: str = "safe") -> Group:
    made = [trajectory([5], 0.0, objectives={name: value}) for value in values]
    return Group(Prompt("p", (1,), "p"), tuple(made))


@pytest.fixture
def rewards() -> Rewards:
    return Rewards([], ())


def test_a_multiplier_moves_by_what_is_missing_and_stops_at_zero(rewards: Rewards) -> None:
    made = Constraints([constraint("safe", at_least=0.8, start=0.5)], rewards, ALONE)
    assert rewards.extra_weights == {"safe": 0.5}
    # 0.5 + 2 (0.8 - 0.6)
    metrics = made.observe([scored(1.0, 0.5), scored(0.3)])
    assert metrics["reward/multiplier/safe"].value == pytest.approx(0.9)
    assert rewards.extra_weights == {"safe": pytest.approx(0.9)}
    made.observe([scored(1.0, 1.0)])
    assert made.multipliers["safe"] == pytest.approx(0.5)
    for _ in range(2):
        made.observe([scored(1.0, 1.0)])
    assert made.multipliers["safe"] == 0.0


def test_an_upper_bound_takes_off(rewards: Rewards) -> None:
    made = Constraints([constraint("cost", at_most=0.2)], rewards, ALONE)
    made.observe([scored(0.5, 0.7, name="cost")])
    assert rewards.extra_weights == {"cost": pytest.approx(-0.8)}


def test_the_mean_is_that_of_all_ranks(rewards: Rewards) -> None:
    """The other rank has two completions with value 0, so that the mean is 1/3."""

    class Two(World):
        def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + torch.tensor([0.0, 2.0, 2.0], dtype=tensor.dtype)

    made = Constraints([constraint("safe", at_least=1.0)], rewards, Two(0, 2, torch.device("cpu")))
    made.observe([scored(1.0)])
    assert made.multipliers["safe"] == pytest.approx(4 / 3)


def test_a_step_without_completions_moves_nothing(rewards: Rewards) -> None:
    made = Constraints([constraint("safe", at_least=1.0, start=1.5)], rewards, ALONE)
    assert made.observe([]) == {"reward/multiplier/safe": Max(1.5)}


def test_an_objective_that_nobody_gives_is_named(rewards: Rewards) -> None:
    made = Constraints([constraint("save", at_least=1.0)], rewards, ALONE)
    with pytest.raises(RewardError, match=r"no reward function gave the objective 'save' of reward.constr"):
        made.observe([scored(1.0)])


def test_the_multiplier_is_part_of_the_reward_and_of_the_weights() -> None:
    from tests.rewards.test_hostile import given, submit

    mine = str(Path(__file__).with_name("my_rewards.py"))
    rewards = Rewards([RewardSpec(f"{mine}:brevity", weight=0.5, workers=1)], ())
    rewards.extra_weights = {"brevity": 2.0}
    assert given(submit(rewards, ["a", "too long by far"])) == [2.5, 0.0]
    assert rewards.weights == {"brevity": 2.5}
    constraints = Constraints([constraint("brevity", at_least=1.0, start=2.0)], rewards, ALONE)
    state = json.loads(json.dumps(constraints.state()))
    rewards.close()

    resumed = Rewards([RewardSpec(f"{mine}:brevity", weight=0.5, workers=1)], ())
    after = Constraints([constraint("brevity", at_least=1.0)], resumed, ALONE)
    assert after.weights() == {}
    after.load(state, {})
    assert after.weights() == {"brevity": 2.5}, "known before anything is scored"
    resumed.close()


def test_an_objective_that_another_rank_has_seen_weighs_the_same_here(rewards: Rewards) -> None:
    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, {"safe": "judge"}]

    rewards.pools = [WorkerPool("judge", RewardSpec("a:b", weight=0.25))]
    assert Constraints([], rewards, Two(0, 2, torch.device("cpu"))).weights() == {"safe": 0.25}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"constraints": [{"objective": "a", "rate": 1}]}, "needs at_least or at_most, one of them"),
        (
            {"constraints": [{"objective": "a", "rate": 1, "at_least": 0, "at_most": 1}]},
            "needs at_least or at_most, one of them",
        ),
        ({"constraints": [{"objective": "a", "at_least": 0}]}, "rate"),
        ({"constraints": [{"objective": "a", "rate": 1, "at_least": 1}]}, "set reward.success_objective"),
        (
            {"constraints": [{"objective": "a", "rate": 1, "at_least": 1}] * 2, "success_objective": "a"},
            "must be of different objectives, got a, a",
        ),
    ],
)
def test_a_constraint_that_cannot_be_is_refused(reward: dict[str, Any], message: str) -> None:
    base = {"run_dir": "r", "steps": 1, "model": {"path": "m"}, "data": {"train": "t"}}
    reward = {"functions": [{"path": "a:b"}], **reward}
    with pytest.raises(ConfigError, match=message):
        make_config({**base, "algorithm": {"name": "grpo"}, "reward": reward})


def two_objectives(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """The reward wants only the letter a; the constraint demands that a quarter is b."""
    (folder / "two.py").write_text(TWO)
    reward = {
        "functions": [
            {"path": f"{folder}/two.py:share_of_a", "workers": 1},
            {"path": f"{folder}/two.py:share_of_b", "workers": 1, "weight": 0.0},
        ],
        "constraints": [{"objective": "share_of_b", "at_least": 0.25, "rate": 0.5}],
        "success_objective": "share_of_a",
    }
    return bandit_settings(folder, model, reward=reward, **changes)


def test_the_check_says_what_is_held(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = make_config(two_objectives(tmp_path, tiny_model_dir))
    inputs = load_inputs(config)
    try:
        lines = list(describe(config, inputs))
    finally:
        inputs.rewards.close()
    assert "constraint   mean of share_of_b at least 0.25: multiplier from 0, rate 0.5" in lines


def test_a_resumed_run_goes_on_with_its_multipliers(tmp_path: Path, tiny_model_dir: Path) -> None:
    checkpoint = {"export": False, "every": 2}
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    train(two_objectives(folders[0], tiny_model_dir, steps=4, checkpoint=checkpoint))
    train(two_objectives(folders[1], tiny_model_dir, steps=2, checkpoint=checkpoint))
    train(two_objectives(folders[1], tiny_model_dir, steps=4, checkpoint={**checkpoint, "resume": "auto"}))
    whole, resumed = (without_clocks(metrics_of(folder)) for folder in folders)
    assert resumed == whole
    multipliers = [record["reward/multiplier/share_of_b"] for record in whole]
    assert multipliers == sorted(multipliers)
    assert multipliers[0] > 0.1
