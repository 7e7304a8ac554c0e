"""How many completions each prompt of a step gets: all the same, or where they teach (`rlhf.algos.budget`).

One budget for all ranks: whatever the rule, a step samples `group_size` completions a prompt in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.algos.budget import SuccessTracker, allocate, budget_metrics
from rlhf.config import BudgetConfig, RewardConfig
from rlhf.distributed import World
from rlhf.metrics import Metrics
from rlhf.rewards import RewardError
from rlhf.state import Stateful, TensorFiles
from rlhf.types import Group, Prompt, Trajectory


class Budgets(Stateful):
    """Success rates of the prompts seen so far, and what they are worth sampling."""

    def __init__(self, section: BudgetConfig, reward: RewardConfig, group_size: int, world: World) -> None:
        self.section, self.reward, self.group_size, self.world = section, reward, group_size, world
        prior = None if section.prior is None else (section.prior, section.prior)
        self.tracker = SuccessTracker(prior=prior)

    def sizes(self, prompts: Sequence[Prompt]) -> list[int]:
        """Completions of each of this rank's prompts. Every rank calls it, with prompts or without."""
        if self.section.rule == "uniform":
            return [self.group_size] * len(prompts)
        ids = self.world.gather([p.id for p in prompts])
        rates = [self.tracker.rate(name) for part in ids for name in part]
        if not rates:
            return []
        sizes = allocate(
            rates, self.group_size * len(rates), self.section.low, self.section.high, unknown=self.group_size
        )
        first = sum(len(part) for part in ids[: self.world.rank])
        return sizes[first : first + len(prompts)]

    def observe(self, groups: Sequence[Group]) -> Metrics:
        """Learns from the outcomes of a step, on every rank from those of all of them."""
        check_objective(groups, self.reward)
        mine = [(g.prompt.id, [float(is_right(t, self.reward)) for t in g.trajectories]) for g in groups]
        for part in self.world.gather(mine):
            for name, outcomes in part:
                self.tracker.update(name, outcomes)
        rewards = [float("nan") if t.reward is None else t.reward for g in groups for t in g.trajectories]
        index = [i for i, g in enumerate(groups) for _ in g.trajectories]
        threshold = self.reward.success_threshold
        group = torch.tensor(index, dtype=torch.long)
        return budget_metrics(torch.tensor(rewards), group, threshold=threshold)

    def state(self) -> dict[str, Any]:
        return dict(self.tracker.state_dict())

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.tracker.load_state_dict(state)


def check_objective(groups: Sequence[Group], section: RewardConfig) -> None:
    """Raises RewardError when rewards were given and none of them is of `reward.success_objective`."""
    given = {name for g in groups for t in g.trajectories for name in t.objectives}
    if given and section.success_objective is not None and section.success_objective not in given:
        raise RewardError(
            f"no reward function gave reward.success_objective = {section.success_objective!r}; there are "
            f"{', '.join(sorted(given))}"
        )


def is_right(trajectory: Trajectory, section: RewardConfig) -> bool:
    """Whether a completion counts as solved (`reward.success_objective`, `reward.success_threshold`)."""
    objective = section.success_objective
    value = trajectory.reward if objective is None else trajectory.objectives.get(objective)
    return value is not None and value >= section.success_threshold
