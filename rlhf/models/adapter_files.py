"""LoRA adapters as peft saves them: read, and added up exactly.

    sum over i of weight_i scale_i B_i A_i  =  B A,    A = [A_1; A_2; ...]    B = [weight_1 scale_1 B_1, ...]

with scale = alpha / rank. The ranks add up; a layer that an adapter lacks has zeros in its place, so that
all layers have the same rank. (Means of the A and of the B are not the mean of the adapters: B_1 A_2 would be
in it.)

peft's `add_weighted_adapter("cat")` computes the same in a model. It is not used because it needs the whole
base model in memory, refuses targets of which one is a regular expression, and keeps `use_rslora` of the
first adapter, by which its result is scaled by the root of the rank.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from rlhf.models.weight_files import ModelError, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
UNUSUAL = {
    "use_dora": "DoRA is not linear in its weights",
    "lora_bias": "it has biases",
    "modules_to_save": "it has whole layers beside its matrices",
    "trainable_token_indices": "it has rows of the embeddings",
    "target_parameters": "it adapts parameters that are no layers",
    "layer_replication": "it repeats layers of the model",
}
"""Settings of an adapter that cannot be added up as matrices, and why."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The adapter in a folder: for each layer A `[rank, in]` and scale * B `[out, rank]`, in float32."""

    folder: Path
    base: str
    """The model that it was trained on, as the folder names it."""
    config: Mapping[str, Any]
    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(down) for down, _ in self.layers.values())


def read_adapter(folder: Path) -> AdapterFile:
    """Reads an adapter. Raises ModelError: there is none, it is damaged, or it has more than A and B."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no LoRA adapter: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is no LoRA adapter: its peft_type is {config.get('peft_type')}")
    reasons = [reason for key, reason in UNUSUAL.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append("it has biases")
    if reasons:
        raise ModelError(f"{folder} cannot be added up as products of two matrices: {reasons[0]}")
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged ({error}): write it again") from None
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in _layers(tensors, folder):
        down, up = (tensors[f"{PREFIX}{layer}{end}"].float() for end in (DOWN, UP))
        layers[layer] = down, _scale(config, layer, rank=len(down)) * up
    if not layers:
        raise ModelError(f"{folder / WEIGHTS} has no weights: the adapter is of no layer")
    return AdapterFile(folder, str(config.get("base_model_name_or_path") or ""), config, layers)


def combine(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the weighted sum, for each layer that an adapter has.

    Raises ModelError: a layer has not the same shape in all of them, so they are of different models.
    """
    combined: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in sorted({name for adapter in adapters for name in adapter.layers}):
        own = next(a for a in adapters if layer in a.layers)
        width, height = own.layers[layer][0].shape[1], own.layers[layer][1].shape[0]
        down = torch.zeros(sum(a.rank for a in adapters), width)
        up = torch.zeros(height, len(down))
        begin = 0
        for adapter, weight in zip(adapters, weights, strict=True):
            if layer in adapter.layers:
                a, b = adapter.layers[layer]
                if (a.shape[1], b.shape[0]) != (width, height):
                    raise ModelError(
                        f"{layer} has {b.shape[0]} x {a.shape[1]} weights in {adapter.folder}, but "
                        f"{height} x {width} in {own.folder}: the adapters are of different models"
                    )
                down[begin : begin + len(a)] = a
                up[:, begin : begin + len(a)] = weight * b
            begin += adapter.rank
        combined[layer] = down, up
    return combined


@dataclass(frozen=True, slots=True)
class Combined:
    """An adapter to be saved, of rank and alpha alike."""

    base: str
    config: Mapping[str, Any]
    """That of one of the adapters which it is made of."""
    layers: Mapping[str, tuple[Tensor, Tensor]]

    def save_pretrained(self, save_directory: str) -> None:
        """Writes what `peft.PeftModel.from_pretrained(base, folder)` and vLLM load."""
        peft: Any = importlib.import_module("peft")
        tensors: dict[str, Tensor] = {}
        for layer, (down, up) in self.layers.items():
            tensors |= {f"{PREFIX}{layer}{DOWN}": down, f"{PREFIX}{layer}{UP}": up}
        rank = len(next(iter(self.layers.values()))[0])
        save_file(tensors, Path(save_directory) / WEIGHTS, metadata={"format": "pt"})
        peft.LoraConfig(
            base_model_name_or_path=self.base,
            task_type=self.config.get("task_type"),
            fan_in_fan_out=bool(self.config.get("fan_in_fan_out")),
            inference_mode=True,
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            # whole paths: the short names of two adapters together could fit further layers
            target_modules=sorted(self.layers),
        ).save_pretrained(save_directory)


def _layers(tensors: Mapping[str, Tensor], folder: Path) -> Iterator[str]:
    """The paths of the layers. Raises ModelError: a tensor is neither A nor B of a linear layer."""
    for name, tensor in tensors.items():
        end = DOWN if name.endswith(DOWN) else UP
        layer = name.removeprefix(PREFIX).removesuffix(end)
        pair = {f"{PREFIX}{layer}{DOWN}", f"{PREFIX}{layer}{UP}"}
        if name not in pair or not pair <= set(tensors) or tensor.dim() != 2:
            raise ModelError(
                f"{folder / WEIGHTS} has {name}, {list(tensor.shape)}, which is neither A nor B of a linear "
                "layer: only adapters of linear layers can be combined"
            )
        if end == DOWN:
            yield layer


def _scale(config: Mapping[str, Any], layer: str, *, rank: int) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) where the adapter is rank-stabilised (rsLoRA)."""
    alpha = float(config["lora_alpha"])
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    if patterns:
        other: Any = importlib.import_module("peft.utils.other")
        alpha = float(patterns.get(other.get_pattern_key(patterns.keys(), layer), alpha))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
