"""Numbers that follow the run from step to step: the KL coefficient, the scale of rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from rlhf.algos.algorithm import KL
from rlhf.algos.critic import RewardScaling
from rlhf.algos.value import RunningMoments
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.metrics import Max, Metrics


class KLCoefficient(Stateful):
    """The KL coefficient in force: constant, or moved towards `kl.target` after each step."""

    def __init__(self, kl: KL) -> None:
        self.value, self._controller = kl.coef, kl.controller

    def adapt(self, metrics: Metrics) -> Metrics:
        """Moves it for the next step, if there is a target and this one measured a KL."""
        observed = metrics["kl/ref"].value if "kl/ref" in metrics else math.nan
        if self._controller is None or not math.isfinite(observed):
            return {}
        in_force, controller = self.value, replace(self._controller, coef=self.value)
        self.value = controller.update(observed, int(metrics["rollout/samples"].value)).coef
        return {"kl/coef": Max(in_force)}

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.value = state["value"]


class RewardScaler(Stateful):
    """Rewards scaled by the mean and deviation of all of the run so far, those of the step included."""

    def __init__(self, scaling: RewardScaling, all_sum: Callable[[Tensor], Tensor]) -> None:
        self.scaling, self.all_sum, self.moments = scaling, all_sum, RunningMoments()

    def __call__(self, rewards: Tensor) -> Tensor:
        """`[S]` of this rank -> the same. Every rank calls it, with rewards or without."""
        if self.scaling.has_memory:
            self.moments = self.moments.update(rewards, all_sum=self.all_sum)
        return self.scaling.apply(rewards, self.moments)

    def state(self) -> dict[str, Any]:
        return asdict(self.moments)

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.moments = RunningMoments(**state)
