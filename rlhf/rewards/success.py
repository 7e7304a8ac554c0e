"""When a completion counts as correct: one objective, or the whole reward, reaches a threshold."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.config.reward import RewardConfig
from rlhf.rewards.workers.pool import RewardError
from rlhf.types import Group, Trajectory


def check_objective(groups: Sequence[Group], section: RewardConfig) -> None:
    """Raises RewardError when completions have objectives but none has `reward.success_objective`."""
    given = {name for g in groups for t in g.trajectories for name in t.objectives}
    if given and section.success_objective is not None and section.success_objective not in given:
        raise RewardError(
            f"no reward function gave reward.success_objective = {section.success_objective!r}; the "
            f"objectives are {', '.join(sorted(given))}"
        )


def success_value(trajectory: Trajectory, section: RewardConfig) -> float | None:
    """The number that decides whether a completion is correct.

    It is the value of `reward.success_objective` or, if that is not set, the weighted sum of all objectives.
    None: the completion does not have it, because a function failed on it or none applies to it.
    """
    objective = section.success_objective
    return trajectory.reward if objective is None else trajectory.objectives.get(objective)


def is_correct(trajectory: Trajectory, section: RewardConfig) -> bool:
    """Whether a completion is correct: its `success_value` is at least `reward.success_threshold`.

    A completion without a value is not correct.
    """
    value = success_value(trajectory, section)
    return value is not None and value >= section.success_threshold
