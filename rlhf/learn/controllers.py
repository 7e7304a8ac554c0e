"""Numbers that adapt from step to step and are saved with the run: KL coefficient, scale of rewards."""

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

    def follow(self, kl: KL) -> None:
        """Takes the coefficient of this step's algorithm, unless a target moves it."""
        if self._controller is None:
            self.value = kl.coef

    def adapt(self, metrics: Metrics) -> Metrics:
        """Moves the coefficient for the next step, if there is a target and this step measured a KL.

        The metric is the coefficient that this step learned with.
        """
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
    """Rewards scaled by the mean and deviation of all rewards of the run so far, this step's included."""

    def __init__(self, scaling: RewardScaling, all_sum: Callable[[Tensor], Tensor]) -> None:
        self.scaling, self.all_sum, self.moments = scaling, all_sum, RunningMoments()

    def __call__(self, rewards: Tensor) -> Tensor:
        """The scaled rewards of this rank, `[S]` as given. Every rank calls it, even one without rewards."""
        if self.scaling.has_memory:
            self.moments = self.moments.update(rewards, all_sum=self.all_sum)
        return self.scaling.apply(rewards, self.moments)

    def state(self) -> dict[str, Any]:
        return asdict(self.moments)

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.moments = RunningMoments(**state)
