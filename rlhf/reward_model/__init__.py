"""Reward models trained on pairs or ratings: `task: reward_model`."""
