"""The presets of "Unpacking DPO and PPO" (arXiv:2406.09279) have its updates and learning rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config.load import load_config, load_task
from rlhf.config.reward_model import RewardModelConfig
from rlhf.learn.optimizer import lr_factor

CONFIGS = Path(__file__).parents[2] / "configs"
PAIRS = 60_908


def test_dpo_makes_three_epochs_and_ends_at_a_rate_of_0():
    config = load_config(CONFIGS / "unpacking_dpo.yaml")
    # 3 * 60908 / 32 = 5710.1
    assert config.rollout.prompts_per_step == 32 and config.steps == 3 * PAIRS // 32 == 5710
    assert config.algorithm["beta"] == 0.01

    def lr(step: int) -> float:
        return config.learner.lr * lr_factor(step, config.learner, config.steps)

    assert [lr(570), lr(571), lr(5710)] == pytest.approx([5e-7, 5e-7, 0.0])
    # half-way between the end of the warm-up and the end: (571 + 5710) / 2 = 3140.5
    assert (lr(3140) + lr(3141)) / 2 == pytest.approx(2.5e-7)


def test_the_reward_model_makes_one_epoch_and_ends_at_a_rate_of_1e_6():
    config = load_task(CONFIGS / "unpacking_reward_model.yaml")
    assert isinstance(config, RewardModelConfig)
    assert config.batch.low == config.batch.high == 512 and config.steps == round(PAIRS / 512) == 119
    assert config.lm_coef == 0.0

    def lr(step: int) -> float:
        return config.learner.lr * lr_factor(step, config.learner, config.steps)

    # the warm-up is 0.03 * 119 = 3.57 updates, rounded up
    assert [lr(3), lr(4), lr(119)] == pytest.approx([1e-5, 1e-5, 1e-6])


def test_ppo_makes_one_epoch_of_single_rollouts_in_minibatches_of_64():
    config = load_config(CONFIGS / "unpacking_ppo.yaml")
    rollout, learner = config.rollout, config.learner
    assert (rollout.prompts_per_step, rollout.group_size, config.steps) == (512, 1, round(PAIRS / 512))
    assert rollout.prompts_per_step * rollout.group_size / learner.minibatches == 64
    algorithm = config.build_algorithm()
    assert (algorithm.kl.coef, algorithm.kl.placement, algorithm.reward_scaling.has_memory) == (
        0.05,
        "reward",
        False,
    )
    assert algorithm.critic is not None and config.critic.path == "runs/unpacking_reward_model/model"
    assert load_task(CONFIGS / "unpacking_reward_model.yaml").run_dir in config.critic.path
