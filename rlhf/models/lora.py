"""LoRA: a low-rank adapter beside each linear layer learns, and the weights it stands on stay as they are.

    y = W x + (alpha / rank) B A x          A [rank, in], B [out, rank], B = 0 at the start

(arXiv:2106.09685 section 4.1; the layers are those of peft.) The frozen weights serve three times: under the
adapter they are the policy, with the adapter switched off they are the reference of a KL, and the engine
samples from `Adapter.merged`, which shares every tensor with the policy except the adapted weights, where it
holds W + (alpha / rank) B A. The language-model head and the embeddings have no adapter.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config.model import LoraConfig
from rlhf.distributed.world import derive_seed
from rlhf.models.pretrained import ModelError, head_of
from rlhf.torch_typed import modules_by_name, seeded

NAME = "default"
"""The adapter's, in the names of its weights; peft leaves it out of the files it writes."""


class Adapter:
    """The adapter of one model, which it changes in place: its linear layers become peft's.

    Raises ModelError: a target is no linear layer of the model.
    """

    def __init__(self, model: PreTrainedModel, section: LoraConfig, *, seed: int) -> None:
        # an extra; its annotations are too incomplete for a strict check
        peft: Any = importlib.import_module("peft")
        targets = _targets(model, section.targets)
        # every parameter is the same object as in the model, so a cast of the model's weights is one of these
        self.merged = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        config = peft.LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            target_modules=targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        with seeded(derive_seed(seed, "lora")):
            self.peft: Any = peft.get_peft_model(model, config)
        self._model = model
        kind, modules = peft.tuners.lora.Linear, modules_by_name(model)
        self._layers: dict[str, Any] = {name: m for name, m in modules.items() if isinstance(m, kind)}

    @contextmanager
    def off(self) -> Generator[None]:
        """The model computes what it did before there was an adapter."""
        with self.peft.disable_adapter():
            yield

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the adapted weights of now into `merged`, in the type the model computes in."""
        for name, layer in self._layers.items():
            target = self.merged.get_submodule(name)
            base = layer.get_base_layer().weight
            weight = _merged(base, layer)
            if target.get_parameter("weight") is base:
                target.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            else:
                target.get_parameter("weight").copy_(weight)

    @torch.no_grad()
    def outdated(self) -> tuple[str, float] | None:
        """A layer whose merged weight is not that of the adapter of now, and the largest difference."""
        for name, layer in self._layers.items():
            current = _merged(layer.get_base_layer().weight, layer)
            held = self.merged.get_submodule(name).get_parameter("weight")
            if not torch.equal(held, current):
                return name, (held.float() - current.float()).abs().max().item()
        return None

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What it stands on, under the names there are without it."""
        for name, weight in self._model.named_parameters():
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), weight

    @torch.no_grad()
    def factors(self) -> Iterator[tuple[str, Tensor]]:
        """A and (alpha / rank) B of every layer, as `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""
        for name, layer in self._layers.items():
            yield f"{name}.lora_A.weight", layer.lora_A[NAME].weight
            up = layer.lora_B[NAME].weight
            yield f"{name}.lora_B.weight", (up.float() * layer.scaling[NAME]).to(up.dtype)

    def save_pretrained(self, save_directory: str) -> None:
        """Writes what `peft.PeftModel.from_pretrained(base, folder)` loads."""
        self.peft.save_pretrained(save_directory, save_embedding_layers=False)


def _merged(base: Tensor, layer: Any) -> Tensor:
    """W + (alpha / rank) B A, in float32 at least and rounded once."""
    up, down = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
    kind = torch.promote_types(base.dtype, torch.float32)
    return torch.addmm(base.to(kind), up.to(kind), down.to(kind), alpha=layer.scaling[NAME]).to(base.dtype)


def _targets(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Names of layers as peft takes them: the last part of a path, several of its last parts, or all."""
    head, modules = head_of(model), modules_by_name(model)
    linears = {name for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    last = sorted({name.rpartition(".")[2] for name in linears})
    for target in wanted:
        if not _named(target, linears):
            near = difflib.get_close_matches(target, last, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ModelError(
                f"model.lora.targets has {target!r}, which is no linear layer of {type(model).__name__} "
                f"below its head{hint} There are: {', '.join(last)}"
            )
    targets: set[str] = set()
    for target in wanted or last:
        named = _named(target, linears)
        # a vision tower has convolutions and numbered layers that share a name with linear ones
        targets |= {target} if named == _named(target, modules) else named
    return sorted(targets)


def _named(target: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name == target or name.endswith(f".{target}")}
