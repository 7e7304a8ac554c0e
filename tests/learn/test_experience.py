"""Scored groups to Experience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.distributed.world import World
from rlhf.learn.controllers import KLCoefficient
from rlhf.learn.experience import pack_groups
from rlhf.metrics import Mean, Metrics, Sum
from rlhf.types import FinishReason, Group, Prompt, Trajectory
from tests.support import group, learner_of, policy_of, trajectory


def test_two_groups_become_the_tensors_of_the_worked_example():
    groups = [group("x", [7, 8], [[1, 2], [3]], [1.0, 0.0]), group("y", [9], [[4, 5]], [1.0])]
    packed = pack_groups(groups, device=torch.device("cpu"))
    assert [p.tolist() for p in packed.prompts] == [[7, 8], [9]]
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert packed.sequence.tolist() == [0, 0, 1, 2, 2]
    assert packed.positions.tolist() == [2, 3, 2, 1, 2]
    assert packed.group.tolist() == [0, 0, 1]


def test_the_kl_coefficient_that_is_reported_is_the_one_the_step_learned_with():
    kl = KLCoefficient(KL(coef=0.01, target=0.1, horizon=100))
    measured: Metrics = {"kl/ref": Mean(0.3), "rollout/samples": Sum(10.0)}
    assert [kl.adapt(measured)["kl/coef"].value for _ in range(2)] == pytest.approx([0.01, 0.01 * 1.02])
    assert kl.value == pytest.approx(0.01 * 1.02**2)


def test_a_sample_without_a_reward_is_masked_and_changes_nothing_for_the_others(tiny_model_dir: Path):
    _, builder = learner_of(policy_of(tiny_model_dir), ALGORITHMS["grpo"](kl=KL()))
    ids = [[5, 6], [7], [8, 9, 10]]
    with_failure = builder.build([group("x", [3, 4], [*ids, [11]], [1.0, 0.0, 0.0, None])], kl_coef=0.0)
    without = builder.build([group("x", [3, 4], ids, [1.0, 0.0, 0.0])], kl_coef=0.0)
    assert with_failure.advantages.tolist() == without.advantages.tolist()
    assert with_failure.token_ids.tolist() == without.token_ids.tolist()


def test_groups_without_any_reward_leave_an_empty_experience(tiny_model_dir: Path):
    learner, builder = learner_of(policy_of(tiny_model_dir), ALGORITHMS["grpo"](kl=KL()))
    experience = builder.build([group("x", [3], [[4]], [None])], kl_coef=0.0)
    assert len(experience.token_ids) == 0
    assert learner.update(experience, step=0, seed=0, kl_coef=0.0)["update/no_signal"].value == 1


def test_truncated_trajectories_are_compared_but_not_learned_from_when_asked(tiny_model_dir: Path):
    algorithm = ALGORITHMS["dapo"](max_tokens=64, drop_truncated=True)
    _, builder = learner_of(policy_of(tiny_model_dir), algorithm)
    cut = trajectory([5, 6], 0.0, finish_reason=FinishReason.LENGTH)
    groups = [Group(Prompt("x", (3,), "x"), (trajectory([7, 8], 1.0), cut))]
    experience = builder.build(groups, kl_coef=0.0)
    assert experience.loss_mask.tolist() == [True, True, False, False]
    assert experience.advantages[0].item() == pytest.approx(0.7071, abs=1e-3)


def test_tool_tokens_keep_their_place_and_their_mask(tiny_model_dir: Path):
    two_turns = trajectory(
        [5, 6, 7, 8, 9], 1.0, loss_mask=(True, True, False, False, True), turns=(0, 0, 0, 0, 1)
    )
    groups = [Group(Prompt("x", (3,), "x"), (two_turns, trajectory([4], 0.0)))]
    packed = pack_groups(groups, device=torch.device("cpu"))
    assert packed.loss_mask.tolist() == [True, True, False, False, True, True]
    assert packed.turn.tolist() == [0, 0, 0, 0, 1, 0]


def test_a_kl_in_the_reward_lowers_the_advantage_of_what_left_the_reference(tiny_model_dir: Path):
    policy, reference = policy_of(tiny_model_dir), policy_of(tiny_model_dir)
    algorithm = ALGORITHMS["rloo"](kl=KL(coef=1.0, estimator="k1", placement="reward"))
    _, builder = learner_of(policy, algorithm, reference)
    groups = [group("x", [3, 4], [[5, 6], [7, 8]], [1.0, 1.0])]
    same = builder.build(groups, kl_coef=1.0)
    assert same.advantages.abs().max() < 1e-5
    with torch.no_grad():
        policy.head.module.weight[5] += 1.0
    moved = builder.build(groups, kl_coef=1.0)
    assert moved.old_logprobs is not None and moved.ref_logprobs is not None
    drift = (moved.old_logprobs - moved.ref_logprobs).view(2, 2).sum(1)
    assert moved.advantages[0].item() == pytest.approx((drift[1] - drift[0]).item(), abs=1e-5)


def of_steps(*steps: tuple[int, float], tokens: int, reward: float) -> Trajectory:
    return trajectory(list(range(5, 5 + tokens)), reward, step_rewards=steps)


def test_rewards_of_steps_stand_at_their_tokens_and_the_rest_at_the_end(tiny_model_dir: Path):
    _, builder = learner_of(policy_of(tiny_model_dir), ALGORITHMS["grpo_ps"](kl=KL()))
    first = (of_steps((1, 0.1), (2, 0.2), tokens=4, reward=0.1 + 0.2), trajectory([3], 0.5))
    groups = [
        Group(Prompt("x", (3,), "x"), first),
        Group(Prompt("y", (3,), "y"), (of_steps((0, -1.0), tokens=2, reward=0.0),)),
    ]
    inputs = builder.scores(groups)
    assert inputs.steps is not None
    at, none = inputs.steps.at, inputs.steps.at.isnan().tolist()
    assert none == [True, False, False, True, True, False, True]
    assert at[~at.isnan()].tolist() == pytest.approx([0.1, 0.2, -1.0])
    assert inputs.rewards.tolist() == pytest.approx([0.3, 0.5, 0.0])
    # exactly nothing where the steps earned everything: a rest of rounding would be normalised to a signal
    assert inputs.steps.rest.tolist() == [0.0, 0.5, 1.0]


def test_rewards_of_steps_are_scaled_as_those_of_completions(tiny_model_dir: Path):
    _, builder = learner_of(policy_of(tiny_model_dir), ALGORITHMS["ppo_max"](kl=KL()))
    two = (of_steps((0, 3.0), tokens=2, reward=4.0), of_steps((1, 1.0), tokens=2, reward=0.0))
    inputs = builder.scores([Group(Prompt("x", (3,), "x"), two)])
    assert inputs.steps is not None
    # rewards 4 and 0: mean 2, unbiased deviation sqrt(8) = 2.828427, by which everything is divided
    assert inputs.rewards.tolist() == pytest.approx([0.707107, -0.707107])
    assert inputs.steps.at[[0, 3]].tolist() == pytest.approx([1.060660, 0.353553], abs=1e-5)
    # (4 - 3 - 2) and (0 - 1 - 2): the mean comes off once
    assert inputs.steps.rest.tolist() == pytest.approx([-0.353553, -1.060660], abs=1e-5)


def test_a_rank_without_steps_has_inputs_of_the_same_form(tiny_model_dir: Path):
    _, builder = learner_of(policy_of(tiny_model_dir), ALGORITHMS["reinforce_pp"](kl=KL()))
    groups = [group("x", [3], [[4, 5]], [1.0])]
    assert builder.scores(groups).steps is None
    # another rank has seen some
    gathered: Any = lambda own: [own, ([], True)]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "gather", lambda self, own: gathered(own))
        inputs = builder.scores(groups)
    assert inputs.steps is not None
    assert inputs.steps.at.isnan().all() and inputs.steps.rest.tolist() == [1.0]
