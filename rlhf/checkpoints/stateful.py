"""What a run remembers between steps: every part that does is saved and resumed by the same three methods.

`Parts.stateful` names them; a checkpoint has one entry of `state.json` and the tensor files of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor


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


TensorFiles = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what its manifest says. The message names the file."""
