"""Metrics of rewards: of the scored groups, and of each reward function."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rlhf.metrics import Max, Mean, Metrics
from rlhf.rewards.workers.batch import BatchScores
from rlhf.types import Group

TAKEN = ("mean", "std", "failed")
"""What no objective may be called: `reward/<name>` is a metric of all objectives together."""


def reward_metrics(groups: Sequence[Group]) -> Metrics:
    """Mean, spread and failures of the rewards, and mean and spread of each objective.

    `reward/std` is the mean over groups of the standard deviation within a group.
    """
    samples = [trajectory for group in groups for trajectory in group.trajectories]
    if not samples:
        return {}
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    metrics: Metrics = {
        "reward/mean": Mean(math.fsum(rewards), len(rewards)),
        "reward/std": _spread([group.rewards for group in groups]),
        "reward/failed": Mean(len(samples) - len(rewards), len(samples)),
    }
    for objective in sorted({name for sample in samples for name in sample.objectives}):
        values = [
            [t.objectives[objective] for t in group.trajectories if objective in t.objectives]
            for group in groups
        ]
        flat = [value for group in values for value in group]
        metrics[f"reward/{objective}"] = Mean(math.fsum(flat), len(flat))
        metrics[f"reward/std/{objective}"] = _spread(values)
    return metrics


def _spread(groups: Sequence[Sequence[float]]) -> Mean:
    """The mean over groups of the standard deviation within the group."""
    spreads = [statistics.pstdev(values) for values in groups if values]
    return Mean(math.fsum(spreads), len(spreads))


def function_metrics(name: str, parts: Sequence[BatchScores], *, has_cache: bool) -> Metrics:
    """Of the function `name`: seconds per sample, shares that failed or were cached, and what it logged."""
    metrics: Metrics = {}
    seconds = sorted(s for part in parts for s in part.seconds)
    failures = [failure for part in parts for _, failure in part.failures]
    count = sum(len(part.scores) for part in parts)
    if count:
        timeouts = sum(failure.kind == "timeout" for failure in failures)
        metrics[f"reward/failed/{name}"] = Mean(len(failures), count)
        metrics[f"reward/timeout/{name}"] = Mean(timeouts, count)
        if has_cache:
            metrics[f"reward/recalled/{name}"] = Mean(sum(part.cached for part in parts), count)
    if seconds:
        metrics[f"time/reward_p50/{name}"] = Max(seconds[len(seconds) // 2])
        metrics[f"time/reward_p99/{name}"] = Max(seconds[len(seconds) * 99 // 100])
    for logged in sorted({logged for part in parts for logged in part.logged}):
        values = [value for part in parts for value in part.logged.get(logged, ())]
        metrics[f"reward/{name}/{logged}"] = Mean(math.fsum(values), len(values))
    return metrics


def taken(objective: str) -> str:
    """What is wrong with the name of an objective that is among `TAKEN`."""
    return f"no objective may be called {objective}, because reward/{objective} is a metric of all of them"
