"""What a run remembers between steps: every part that does is saved and resumed by the same three methods.

`Parts.stateful` names them; a checkpoint has one entry of `state.json` and the tensor files of each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from rlhf.algos.algorithm import KL
from rlhf.algos.critic import RewardScaling
from rlhf.algos.value import RunningMoments
from rlhf.checkpoint import CheckpointError
from rlhf.metrics import Max, Metrics
from rlhf.tensor_files import TensorFiles


class Stateful(ABC):
    """A part with memory: what `state` and `tensors` gave, `load` puts back, and the run goes on the same."""

    def state(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """One mapping of named tensors a file; no two of them may share memory. Of a run on a GPU, those that
        are on the host are not written to any more."""
        return {}

    @abstractmethod
    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        """Raises CheckpointError when they are of another model or another configuration."""


class Cursor(Stateful):
    """Where the run stands."""

    def __init__(self) -> None:
        self.steps_done = 0
        self.position = 0
        """Prompts drawn so far, over all ranks and refills."""

    def state(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done, "position": self.position}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.steps_done, self.position = state["steps_done"], state["position"]


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


def state_of(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    return {name: part.state() for name, part in parts.items()}


def tensors_of(parts: Mapping[str, Stateful]) -> dict[str, dict[str, Tensor]]:
    """The files of all parts, each named `part.file`."""
    return {f"{name}.{file}": group for name, part in parts.items() for file, group in part.tensors().items()}


def load_state(parts: Mapping[str, Stateful], state: Mapping[str, Any], tensors: TensorFiles) -> None:
    """Inverse of `state_of` and `tensors_of`. Raises CheckpointError when it is of a run with other parts."""
    missing = [name for name in parts if name not in state]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {' and no '.join(missing)}, so its run had other settings (another "
            "algorithm, perhaps); go on with those, or begin a new run in another run_dir"
        )
    for name, part in parts.items():
        files = {
            file.removeprefix(f"{name}."): group
            for file, group in tensors.items()
            if file.startswith(f"{name}.")
        }
        part.load(state[name], files)
