"""Objectives that must keep to a bound: their weights move until they do (Lagrange multipliers).

    maximise   the weighted sum of objectives   subject to   mean of c_k >= b_k  (or <= b_k)

is sought as a saddle point: the reward of a completion has lambda_k c_k added (taken off for an upper bound),
and after every step

    lambda_k <- max(0, lambda_k + rate_k (b_k - mean of c_k))          (upper bound: mean of c_k - b_k)

over all completions of the step on all ranks (dual ascent, as in Safe RLHF, arXiv:2310.12773).

Differences from that paper: 1. lambda itself moves, not its logarithm, so it can be exactly 0; 2. the sum is
not divided by 1 + lambda, which a normalisation by the group does anyway; 3. the mean is that of one step.
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
    """What objectives weigh: the multipliers in force, which it puts on the weights of `rewards`."""

    def __init__(self, constraints: Sequence[ConstraintConfig], rewards: Rewards, world: World) -> None:
        self.constraints, self.rewards, self.world = constraints, rewards, world
        self.multipliers = {c.objective: c.start for c in constraints}
        self._apply()

    def observe(self, groups: Sequence[Group]) -> Metrics:
        """Moves the multipliers by the groups of a step; every rank calls it, with groups or without.

        Raises RewardError when the step has rewards and none of a constrained objective.
        """
        scored = [t.objectives for g in groups for t in g.trajectories if t.objectives]
        for c in self.constraints:
            values = [objectives[c.objective] for objectives in scored if c.objective in objectives]
            sums = torch.tensor([sum(values), len(values), len(scored)], dtype=torch.float64)
            total, count, others = numbers(self.world.all_sum(sums.to(self.world.device)))
            if others and not count:
                raise RewardError(
                    f"no reward function gave the objective {c.objective!r} of reward.constraints"
                )
            if count:
                missing = c.sign * (c.bound - total / count)
                self.multipliers[c.objective] = max(0.0, self.multipliers[c.objective] + c.rate * missing)
        self._apply()
        return {f"reward/multiplier/{name}": Max(value) for name, value in self.multipliers.items()}

    def weights(self) -> dict[str, float]:
        """By objective, of all that any rank has seen: groups move between ranks. Every rank calls it."""
        for owners in self.world.gather(self.rewards.owners):
            self.rewards.recall(owners)
        return self.rewards.weights

    def _apply(self) -> None:
        self.rewards.extra_weights = {
            c.objective: c.sign * self.multipliers[c.objective] for c in self.constraints
        }

    def state(self) -> dict[str, Any]:
        return {"multipliers": dict(self.multipliers), "owners": self.rewards.owners}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.multipliers |= state["multipliers"]
        self.rewards.recall(state.get("owners", {}))
        self._apply()
