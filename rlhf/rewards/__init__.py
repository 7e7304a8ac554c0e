"""Reward functions: loading them by name, calling them on a batch, and what counts when one fails."""

from rlhf.rewards.plugin import RewardSpec, load_reward
from rlhf.rewards.scoring import RewardError, Rewards

__all__ = ["RewardError", "RewardSpec", "Rewards", "load_reward"]
