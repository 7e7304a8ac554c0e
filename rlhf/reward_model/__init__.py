"""Reward models: `task: reward_model`."""
