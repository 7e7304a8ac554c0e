"""When a completion counts as right: by one objective, or the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.config.reward import RewardConfig
from rlhf.rewards.workers.pool import RewardError
from rlhf.types import Group, Trajectory


def check_objective(groups: Sequence[Group], section: RewardConfig) -> None:
    """Raises RewardError when rewards were given and none of them is of `reward.success_objective`."""
    given = {name for g in groups for t in g.trajectories for name in t.objectives}
    if given and section.success_objective is not None and section.success_objective not in given:
        raise RewardError(
            f"no reward function gave reward.success_objective = {section.success_objective!r}; there are "
            f"{', '.join(sorted(given))}"
        )


def success_value(trajectory: Trajectory, section: RewardConfig) -> float | None:
    """What says whether a completion is right; None: its reward failed, or none applies."""
    objective = section.success_objective
    return trajectory.reward if objective is None else trajectory.objectives.get(objective)


def is_correct(trajectory: Trajectory, section: RewardConfig) -> bool:
    """Whether a completion counts as solved (`reward.success_objective`, `reward.success_threshold`)."""
    value = success_value(trajectory, section)
    return value is not None and value >= section.success_threshold
