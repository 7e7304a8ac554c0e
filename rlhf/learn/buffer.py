"""The experience of the current step and the number of updates made from it, saved with a checkpoint.

A step samples once and makes `learner.epochs * learner.minibatches` updates from what it sampled. A run
that is stopped between two of them is saved with this buffer and resumes with the next one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.serialization import (
    metrics_from,
    metrics_state,
    pack_images,
    pack_observed,
    unpack_images,
    unpack_observed,
)
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.metrics import Metrics, merge
from rlhf.tensors.candidates import Candidates
from rlhf.tensors.contrasts import Contrasts
from rlhf.torch_typed import integers
from rlhf.types import CriticTargets, Experience, PerceptionInputs

NESTED = {
    "critic": CriticTargets,
    "perception": PerceptionInputs,
    "candidates": Candidates,
    "contrasts": Contrasts,
}
OLD_NAMES = {"kept": "candidates", "right": "correct"}
"""Earlier names of fields of an Experience, which stand in checkpoints that were written under them."""


class Buffer(Stateful):
    """Filled once a step, and emptied when the last update of the step is done."""

    def __init__(self) -> None:
        self.experience: Experience | None = None
        self.updates = 0
        """Updates made from this experience so far."""
        self.metrics: Metrics = {}
        """Metrics of the rollouts and of those updates."""
        self.entropy: Tensor | None = None
        """Entropy `[N]` of each token at the first of those updates that learned from it, NaN for the rest;
        None before the first update."""

    def fill(self, experience: Experience, metrics: Metrics) -> None:
        self.experience, self.updates, self.metrics, self.entropy = experience, 0, metrics, None

    def advance(self, metrics: Metrics) -> None:
        """One more update is done."""
        self.updates, self.metrics = self.updates + 1, merge([self.metrics, metrics])

    def empty(self) -> Metrics:
        """Forgets the experience; returns all metrics of the step."""
        metrics = self.metrics
        self.experience, self.updates, self.metrics, self.entropy = None, 0, {}, None
        return metrics

    def state(self) -> dict[str, Any]:
        metrics = metrics_state(self.metrics)
        return {"filled": self.experience is not None, "updates": self.updates, "metrics": metrics}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        x = self.experience
        if x is None:
            return {}
        saved = _tensors(x, "") | {
            "prompt_lengths": torch.tensor([len(p) for p in x.prompts], dtype=torch.long),
            "prompts": torch.cat([*x.prompts, x.token_ids[:0]]),
        }
        saved |= {} if self.entropy is None else {"entropy": self.entropy}
        saved |= {f"images.{name}": tensor for name, tensor in pack_images(x.images).items()}
        saved |= {f"observed.{name}": tensor for name, tensor in pack_observed(x.observed).items()}
        return {"experience": {name: tensor.clone() for name, tensor in saved.items()}}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.updates = state["updates"]
        self.metrics = metrics_from(state["metrics"])
        self.experience = self.entropy = None
        if not state["filled"]:
            return
        saved = {_current_name(name): tensor for name, tensor in tensors["experience"].items()}
        # checkpoints of earlier versions have no entropy
        self.entropy = saved.pop("entropy", None)
        lengths = integers(saved.pop("prompt_lengths"))
        prompts = torch.split(saved.pop("prompts"), lengths)
        values: dict[str, Any] = {f.name: None for f in fields(Experience)}
        values["prompts"] = tuple(prompt.clone() for prompt in prompts)
        for name, kind in NESTED.items():
            own = _beginning(f"{name}.", saved)
            values[name] = kind(**own) if own else None
        values["images"] = unpack_images(_beginning("images.", saved))
        values["observed"] = unpack_observed(_beginning("observed.", saved))
        values |= {name: tensor for name, tensor in saved.items() if "." not in name}
        self.experience = Experience(**values)


def _beginning(prefix: str, saved: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in saved.items() if name.startswith(prefix)}


def _current_name(name: str) -> str:
    """The dotted name of a saved tensor, with the present name of the field that it begins with."""
    first, dot, rest = name.partition(".")
    return OLD_NAMES.get(first, first) + dot + rest


def _tensors(owner: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of a dataclass and of the dataclasses in it, by dotted name.

    Fields that are tuples or None are left out.
    """
    found: dict[str, Tensor] = {}
    for f in fields(owner):
        value = getattr(owner, f.name)
        if isinstance(value, Tensor):
            found[prefix + f.name] = value
        elif is_dataclass(value):
            found |= _tensors(value, f"{prefix}{f.name}.")
    return found
