"""Checkpoints of any tensors and any state, saved as a run saves its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.saver import Saver
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.run import CheckpointConfig
from rlhf.distributed.world import World

Tensors = dict[str, dict[str, Tensor]]


class Run(Stateful):
    """A run with a single stateful part, for any tensors and any state."""

    def __init__(self, tensors: Tensors, state: dict[str, Any]) -> None:
        self._tensors, self._state = tensors, state

    def state(self) -> dict[str, Any]:
        return self._state

    def tensors(self) -> Tensors:
        return self._tensors

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        raise NotImplementedError


def save(folder: Path, *, step: int, tensors: Tensors, state: dict[str, Any], keep_last: int) -> Path:
    """Saves a checkpoint with files `run.NAME.safetensors` and the state under `run`; returns its folder."""
    section = CheckpointConfig(keep_last=keep_last, background=False)
    alone = World(0, 1, torch.device("cpu"))
    Saver(folder, section, alone, timeout=0.0).save(step, {"run": Run(tensors, state)})
    return folder / f"step_{step:06d}"
