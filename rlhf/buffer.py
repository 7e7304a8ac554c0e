"""The experience of the step under way, and how far its updates have come.

A step samples once and makes `learner.epochs * learner.minibatches` updates from what it sampled. A run
that is stopped between two of them is saved with this buffer and goes on with the next one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf.metrics import ExpMean, Max, Mean, Metrics, Partial, Sum, merge
from rlhf.state import Stateful
from rlhf.tensor_files import TensorFiles
from rlhf.typed import integers
from rlhf.types import CriticTargets, Experience, Images, Kept, PerceptionInputs

KINDS: dict[str, type[Partial]] = {kind.__name__: kind for kind in (Mean, ExpMean, Sum, Max)}
NESTED = {"critic": CriticTargets, "perception": PerceptionInputs, "kept": Kept}


class Buffer(Stateful):
    """Filled once a step, emptied when its last update is done."""

    def __init__(self) -> None:
        self.experience: Experience | None = None
        self.updates = 0
        """Made from this experience so far."""
        self.metrics: Metrics = {}
        """Of the rollouts and of those updates."""

    def fill(self, experience: Experience, metrics: Metrics) -> None:
        self.experience, self.updates, self.metrics = experience, 0, metrics

    def advance(self, metrics: Metrics) -> None:
        """One more update is done."""
        self.updates, self.metrics = self.updates + 1, merge([self.metrics, metrics])

    def empty(self) -> Metrics:
        """Forgets the experience; everything that was measured."""
        metrics = self.metrics
        self.experience, self.updates, self.metrics = None, 0, {}
        return metrics

    def state(self) -> dict[str, Any]:
        metrics = metrics_state(self.metrics)
        return {"filled": self.experience is not None, "updates": self.updates, "metrics": metrics}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        x = self.experience
        if x is None:
            return {}
        plain = _tensors(x, "") | {
            "prompt_lengths": torch.tensor([len(p) for p in x.prompts], dtype=torch.long),
            "prompts": torch.cat([*x.prompts, x.token_ids[:0]]),
        }
        plain |= {f"images.{name}": tensor for name, tensor in pack_images(x.images).items()}
        return {"experience": {name: tensor.clone() for name, tensor in plain.items()}}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.updates = state["updates"]
        self.metrics = metrics_from(state["metrics"])
        self.experience = None
        if not state["filled"]:
            return
        saved = dict(tensors["experience"])
        lengths = integers(saved.pop("prompt_lengths"))
        prompts = torch.split(saved.pop("prompts"), lengths)
        values: dict[str, Any] = {f.name: None for f in fields(Experience)}
        values["prompts"] = tuple(prompt.clone() for prompt in prompts)
        for name, kind in NESTED.items():
            parts = {k.removeprefix(f"{name}."): t for k, t in saved.items() if k.startswith(f"{name}.")}
            values[name] = kind(**parts) if parts else None
        packed = {k.removeprefix("images."): t for k, t in saved.items() if k.startswith("images.")}
        values["images"] = unpack_images(packed)
        values |= {name: tensor for name, tensor in saved.items() if "." not in name}
        self.experience = Experience(**values)


def pack_images(images: Sequence[Images | None]) -> dict[str, Tensor]:
    """Which pictures each prompt has, as tensors: names and files end to end, as bytes."""
    if not images:
        return {}
    files = [source for i in images if i is not None for source in i.sources]
    parts = [b"" if i is None else i.prompt_id.encode() for i in images]
    parts += [file.encode() if isinstance(file, str) else file for file in files]
    return {
        "bytes": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8),
        "lengths": torch.tensor([len(part) for part in parts]),
        "pictures": torch.tensor([0 if i is None else len(i.sources) for i in images]),
        "is_path": torch.tensor([isinstance(file, str) for file in files]),
    }


def unpack_images(tensors: Mapping[str, Tensor]) -> tuple[Images | None, ...]:
    """Inverse of `pack_images`."""
    if not tensors:
        return ()
    ends = list(accumulate(integers(tensors["lengths"]), initial=0))
    held = tensors["bytes"].cpu().numpy().tobytes()
    parts = [held[start:end] for start, end in pairwise(ends)]
    pictures = integers(tensors["pictures"])
    kinds = integers(tensors["is_path"])
    files = iter(
        part.decode() if is_path else part
        for part, is_path in zip(parts[len(pictures) :], kinds, strict=True)
    )
    return tuple(
        Images(name.decode(), tuple(islice(files, count))) if count else None
        for name, count in zip(parts[: len(pictures)], pictures, strict=True)
    )


def _tensors(owner: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of a dataclass and of the dataclasses in it, by dotted name; tuples and None left out."""
    found: dict[str, Tensor] = {}
    for f in fields(owner):
        value = getattr(owner, f.name)
        if isinstance(value, Tensor):
            found[prefix + f.name] = value
        elif is_dataclass(value):
            found |= _tensors(value, f"{prefix}{f.name}.")
    return found


def metrics_state(metrics: Metrics) -> dict[str, list[Any]]:
    """What JSON can hold: of each partial its kind and its numbers."""
    return {name: [type(p).__name__, *_numbers(p)] for name, p in metrics.items()}


def metrics_from(state: Mapping[str, Any]) -> Metrics:
    """Inverse of `metrics_state`."""
    return {name: KINDS[kind](*numbers) for name, (kind, *numbers) in state.items()}


def _numbers(partial: Partial) -> list[float]:
    return [float(getattr(partial, f.name)) for f in fields(partial)]
