"""`Stateful`: the three methods by which every part of a run with state is saved and resumed.

`Components.stateful` lists these parts; each has one entry in a checkpoint's `state.json` and its tensor
files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor


class Stateful(ABC):
    """A part of a run that changes from step to step.

    `load` puts back what `state` and `tensors` returned, and the run continues as if it had never stopped.
    """

    def state(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state as tensors: for each file, its tensors by name. No two tensors may share memory.

        In a run on a GPU, tensors on the host are not copied before they are written in the background, so
        they must not change afterwards.
        """
        return {}

    @abstractmethod
    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        """Puts back a saved state. Raises CheckpointError: it is of another model or other settings."""


class Cursor(Stateful):
    """How far the run has come."""

    def __init__(self) -> None:
        self.steps_done = 0
        self.position = 0
        """Prompts drawn so far, by all ranks and including refills."""
        self.data: str | None = None
        """Digest of the data that the run learns from."""
        self.other_data = False
        """Whether the checkpoint that was loaded is of other data."""

    def state(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done, "position": self.position, "data": self.data}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.steps_done, self.position = state["steps_done"], state["position"]
        # checkpoints of earlier versions have no digest
        before = state.get("data")
        self.other_data = before is not None and self.data is not None and before != self.data


def state_of(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """The JSON states of all parts, by name."""
    return {name: part.state() for name, part in parts.items()}


def tensors_of(parts: Mapping[str, Stateful]) -> dict[str, dict[str, Tensor]]:
    """The tensor files of all parts, each named `part.file`."""
    return {f"{name}.{file}": group for name, part in parts.items() for file, group in part.tensors().items()}


def load_state(parts: Mapping[str, Stateful], state: Mapping[str, Any], tensors: TensorFiles) -> None:
    """Inverse of `state_of` and `tensors_of`. Raises CheckpointError: the saved run had other parts."""
    assert_parts(parts, state)
    for name, part in parts.items():
        files = {
            file.removeprefix(f"{name}."): group
            for file, group in tensors.items()
            if file.startswith(f"{name}.")
        }
        part.load(state[name], files)


def assert_parts(parts: Iterable[str], saved: Container[str]) -> None:
    """Raises CheckpointError: the checkpoint lacks some of the parts, by name."""
    missing = [name for name in parts if name not in saved]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {' and no '.join(missing)}, so its run had other settings (another "
            "algorithm, perhaps); go on with those, or begin a new run in another run_dir"
        )


TensorFiles = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what its manifest says. The message names the file."""
