"""Reward functions: loaded by name, run in worker processes that can be killed, failures counted.

Importing this package imports none of its modules: worker processes import it too and must start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.rewards.measures import reward_metrics
    from rlhf.rewards.plugin import RewardSpec, load_reward
    from rlhf.rewards.scoring import Rewards, Scoring
    from rlhf.rewards.workers.pool import RewardError

MODULE_OF = {
    "RewardError": "rlhf.rewards.workers.pool",
    "RewardSpec": "rlhf.rewards.plugin",
    "Rewards": "rlhf.rewards.scoring",
    "Scoring": "rlhf.rewards.scoring",
    "load_reward": "rlhf.rewards.plugin",
    "reward_metrics": "rlhf.rewards.measures",
}

__all__ = ["RewardError", "RewardSpec", "Rewards", "Scoring", "load_reward", "reward_metrics"]


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULE_OF[name]), name)
