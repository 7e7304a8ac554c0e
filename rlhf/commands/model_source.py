"""Finds and loads the weights that a command names: a run folder, a checkpoint folder or a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.checkpoints import store as checkpoint
from rlhf.checkpoints.stateful import CheckpointError
from rlhf.config.model import ModelConfig
from rlhf.models.lora import Adapter
from rlhf.models.pretrained import ModelError, load_model, local_or_hub
from rlhf.models.vision.text_alone import leave_tower
from rlhf.monitoring.run_folder import RunFolder

FEW = 64
"""Numbers of a weight that go into a digest."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from.

    Examples: `Source("runs/a", Path("runs/a/checkpoints/step_000020"), Path("runs/a/config.yaml"))` and
    `Source("Qwen/Qwen2.5-0.5B", None, None)`.
    """

    name: str
    checkpoint: Path | None
    config: Path | None
    """The config.yaml of the run that wrote the checkpoint."""

    @property
    def folder(self) -> Path | None:
        """The folder that relative paths of `config` start from; None: it is not known."""
        return None if self.config is None else RunFolder(self.config.parent).started_in()


@dataclass(frozen=True, slots=True)
class Weights:
    """A model that can be sampled from, and its adapter where the run trained one."""

    model: PreTrainedModel
    adapter: Adapter | None

    @property
    def module(self) -> PreTrainedModel:
        """The module of the protocol `WeightSource`, by which engines take weights."""
        return self.model

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        model: nn.Module = self.model
        yield from model.named_parameters()

    def digest(self) -> str:
        """Of some numbers of each weight: it tells a model from the same one trained further."""
        found = hashlib.sha256()
        for name, weight in self.named_tensors():
            found.update(f"{name} {list(weight.shape)}".encode())
            found.update(weight.detach().flatten()[:FEW].float().cpu().numpy().tobytes())
        return found.hexdigest()[:20]


def find_source(name: str) -> Source:
    """The source that `name` refers to. A run folder stands for its newest complete checkpoint.

    Raises ModelError or CheckpointError when nothing has that name, or when it holds no weights.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return Source(local_or_hub(name), None, None)
    if (folder / checkpoint.MANIFEST).is_file():
        return Source(name, folder, _config_of(RunFolder(folder.resolve().parent.parent), folder))
    run = RunFolder(folder)
    if run.config.is_file() or run.checkpoints.is_dir():
        newest = checkpoint.latest(run.checkpoints)
        if newest is None:
            raise CheckpointError(
                f"{folder} is a run folder without a complete checkpoint; train the run first"
            )
        return Source(name, newest, _config_of(run, newest))
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a LoRA adapter only; give the merged model (RUN/model), or the checkpoint"
        )
    return Source(local_or_hub(name), None, None)


def load_weights(source: Source, section: ModelConfig, device: torch.device, *, seed: int) -> Weights:
    """The model of `section` in `section.dtype`, with the weights of the checkpoint if there is one.

    Raises ModelError or CheckpointError.
    """
    saved = None if source.checkpoint is None else checkpoint.load(source.checkpoint, device=device)
    model = load_model(section.path, device)
    leave_tower(model)
    adapter = None if section.lora is None else Adapter(model, section.lora, seed=seed)
    if saved is not None:
        _copy(model, saved.tensors["policy.model"], str(source.checkpoint))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(getattr(torch, section.dtype))
    if adapter is None:
        return Weights(model, None)
    adapter.merge()
    return Weights(adapter.merged, adapter)


@torch.no_grad()
def _copy(model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(trained) != set(saved):
        odd = sorted(set(trained) ^ set(saved))[:3]
        raise CheckpointError(f"{where} belongs to another model: {', '.join(odd)} is in only one of the two")
    for name, parameter in trained.items():
        weight = saved[name]
        if weight.shape != parameter.shape:
            raise CheckpointError(
                f"{where} belongs to another model: {name} is {list(weight.shape)} in the checkpoint and "
                f"{list(parameter.shape)} in the model"
            )
        parameter.copy_(weight)


def _config_of(run: RunFolder, found: Path) -> Path:
    if not run.config.is_file():
        raise CheckpointError(
            f"{found} is a checkpoint, but {run.config} is missing, which names its model; restore that file"
        )
    return run.config
