"""Constraints on objectives: Lagrange multipliers change their weights until the bounds are kept.

    maximise   the weighted sum of objectives   subject to   mean of c_k >= b_k  (or <= b_k)

is solved as a saddle point: lambda_k c_k is added to the reward of each completion (subtracted for an upper
bound), and after every step

    lambda_k <- max(0, lambda_k + rate_k (b_k - mean of c_k))          (upper bound: mean of c_k - b_k)

with the mean over all completions of the step on all ranks (dual ascent, as in Safe RLHF, arXiv:2310.12773).

Differences from that paper: 1. lambda itself is updated, not its logarithm, so it can be exactly 0; 2. the
sum is not divided by 1 + lambda, because normalising advantages within a group has the same effect; 3. the
mean is taken over one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.reward import ConstraintConfig
from rlhf.distributed.world import World
from rlhf.metrics import Max, Metrics
from rlhf.rewards.scoring import Rewards
from rlhf.rewards.workers.pool import RewardError
from rlhf.torch_typed import numbers
from rlhf.types import Group


class Constraints(Stateful):
    """Keeps the multiplier of each constraint and adds it to the weight of its objective in `rewards`."""

    def __init__(self, constraints: Sequence[ConstraintConfig], rewards: Rewards, world: World) -> None:
        self.constraints, self.rewards, self.world = constraints, rewards, world
        self.multipliers = {c.objective: c.start for c in constraints}
        self._apply()

    def observe(self, groups: Sequence[Group]) -> Metrics:
        """Updates the multipliers from the groups of a step; every rank must call it, even without groups.

        Raises RewardError when the step has scored completions but none has a constrained objective.
        """
        scored = [t.objectives for g in groups for t in g.trajectories if t.objectives]
        for c in self.constraints:
            values = [objectives[c.objective] for objectives in scored if c.objective in objectives]
            sums = torch.tensor([sum(values), len(values), len(scored)], dtype=torch.float64)
            total, count, num_scored = numbers(self.world.all_sum(sums.to(self.world.device)))
            if num_scored and not count:
                raise RewardError(
                    f"no reward function gave the objective {c.objective!r} of reward.constraints"
                )
            if count:
                missing = c.sign * (c.bound - total / count)
                self.multipliers[c.objective] = max(0.0, self.multipliers[c.objective] + c.rate * missing)
        self._apply()
        return {f"reward/multiplier/{name}": Max(value) for name, value in self.multipliers.items()}

    def weights(self) -> dict[str, float]:
        """Weight of each objective that any rank has seen (groups move between ranks).

        Every rank must call it.
        """
        for owners in self.world.gather(self.rewards.owners):
            self.rewards.add_owners(owners)
        return self.rewards.weights

    def _apply(self) -> None:
        self.rewards.extra_weights = {
            c.objective: c.sign * self.multipliers[c.objective] for c in self.constraints
        }

    def state(self) -> dict[str, Any]:
        return {"multipliers": dict(self.multipliers), "owners": self.rewards.owners}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.multipliers |= state["multipliers"]
        self.rewards.add_owners(state.get("owners", {}))
        self._apply()
