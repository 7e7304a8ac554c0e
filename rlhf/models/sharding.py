"""A model in shards: each rank holds rows of every weight and gathers one layer at a time to compute with it.

FSDP2 (`fully_shard`; the scheme is ZeRO stage 3, arXiv:1910.02054 section 5). What lies on a rank between
two passes is its rows of every weight in float32, which are the optimizer's masters; a layer is gathered in
the type the model computes in, used, and given up again. Gradients are summed in float32, and each rank keeps
those of its rows. With several groups of `shard_ranks` ranks (nodes, say), every group holds the whole model
and gradients are summed over the groups as well.

A model is opened on the meta device and each rank reads its own rows from the safetensors files: none ever
holds more than its part and one layer.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.fsdp as fsdp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rlhf.config.learner import DistributedConfig
from rlhf.distributed.shards import as_shard, first_row, own_rows
from rlhf.distributed.world import World
from rlhf.models.pretrained import ModelError, base_prefix, empty_model, layer_classes, model_folder
from rlhf.rollout.weight_file import WeightFile
from rlhf.torch_typed import modules_by_name

# their annotations are too incomplete for a strict check
_fsdp: Any = fsdp
_safe_open: Any = safe_open
T = TypeVar("T")
BACKBONE = "tandem_backbone"
SCORE = "score.weight"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How models are cut: the ranks as a mesh, over whose last dimension the rows of weights are dealt."""

    mesh: DeviceMesh
    computed: torch.dtype

    def exact(self) -> Sharding:
        """The same for a model that computes in float32."""
        return replace(self, computed=torch.float32)

    @classmethod
    def of(cls, section: DistributedConfig, computed: torch.dtype, world: World) -> Sharding | None:
        """None where every rank holds the whole model: as set, and where there is one rank alone."""
        if section.mode == "replicated" or world.size == 1:
            return None
        ranks = shard_ranks(section, world.size)
        shape, names = (world.size // ranks, ranks), ("replicate", "shard")
        if shape[0] == 1:
            shape, names = shape[1:], names[1:]
        return cls(init_device_mesh(world.device.type, shape, mesh_dim_names=names), computed)


def shard_ranks(section: DistributedConfig, size: int) -> int:
    """Over how many ranks a model is cut: as set, else over those of one machine.

    Raises ValueError: the ranks cannot be dealt to groups of that size.
    """
    ranks = section.shard_ranks or min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    if size % ranks:
        raise ValueError(
            f"distributed.shard_ranks is {ranks}, but {size} ranks cannot be dealt to groups of that many"
        )
    return ranks


def open_policy(path: str, sharding: Sharding, *, trains: bool) -> PreTrainedModel:
    """The causal language model of a folder in shards, float32 ones if it `trains`.

    Every rank of the mesh calls it. Raises ModelError: it has no safetensors files, or they lack a weight.
    """
    stored = torch.float32 if trains else sharding.computed
    model, files = empty_model(path, stored, head=True), WeightFiles(model_folder(path))
    return _shard(model, files, sharding, stored=stored, trains=trains)


def open_scorer(path: str, sharding: Sharding) -> tuple[PreTrainedModel, Tensor | None]:
    """`pretrained.load_scorer` in float32 shards; the weight of the score head is whole."""
    model, files = empty_model(path, torch.float32, head=False), WeightFiles(model_folder(path))
    weight = files.rows(SCORE, 0, None).float() if SCORE in files else None
    return _shard(model, files, sharding, stored=torch.float32, trains=True), weight


def _shard(
    model: PreTrainedModel, files: WeightFiles, sharding: Sharding, *, stored: torch.dtype, trains: bool
) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.requires_grad_(trains)
    names = layer_classes(model)
    policy = fsdp.MixedPrecisionPolicy(param_dtype=sharding.computed, reduce_dtype=torch.float32)
    for module in [m for m in model.modules() if type(m).__name__ in names]:
        _fsdp.fully_shard(module, mesh=sharding.mesh, mp_policy=policy)
    _fsdp.fully_shard(model, mesh=sharding.mesh, mp_policy=policy)
    for module in shards(model):
        # losses are divided by global counts already: gradients are added up, not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _fill(model, files, sharding, stored)
    register_backbone(model)
    return model.eval()


def register_backbone(model: Any) -> None:
    """Gives `model` its backbone's forward as a method that the weights outside of layers are gathered for.

    They stay so until the backward pass has used them: the head is among them.
    """

    def forward(**inputs: Any) -> Tensor:
        return model.base_model(**inputs).last_hidden_state

    setattr(model, BACKBONE, forward)
    _fsdp.register_fsdp_forward_method(model, BACKBONE)


def backbone(model: Any, **inputs: Any) -> Tensor:
    """Hidden states of a model, sharded or whole."""
    # gathered anew: weights that a pass without backward has left there are those before the last update
    sharded = give_up(model)
    if sharded and model.base_model is not model:
        return getattr(model, BACKBONE)(**inputs)
    return model.base_model(**inputs).last_hidden_state


def give_up(model: nn.Module) -> bool:
    """Frees weights outside of layers that a pass without backward has gathered; whether it has shards."""
    if not isinstance(model, FSDPModule):
        return False
    model.reshard()
    return True


def shards(model: nn.Module) -> Iterator[Any]:
    """The parts that are gathered together, the model itself first."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def in_step(items: Iterable[T], model: nn.Module, world: World) -> Iterator[T | None]:
    """`items`, and then None for as long as another rank has some left: each pass of a sharded model is one
    of all ranks. Every rank calls it."""
    if not isinstance(model, FSDPModule):
        yield from items
        return
    own = list(items)
    most = max(world.gather(len(own)))
    yield from own
    yield from [None] * (most - len(own))


@torch.no_grad()
def gathered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, in the type the model computes in, under its Hugging Face name.

    Of a model in shards layer by layer, each in one collective, and given up when the next is asked for: a
    rank holds its rows and one layer. Every rank iterates, to the end.
    """
    if not isinstance(model, FSDPModule):
        yield from model.named_parameters()
        return
    parts: dict[str, Any] = {n: m for n, m in modules_by_name(model).items() if isinstance(m, FSDPModule)}
    for prefix, module in parts.items():
        module.unshard()
        inner = tuple(f"{name}." for name in parts if name != prefix and name.startswith(prefix))
        for name, parameter in module.named_parameters(prefix=prefix):
            if not name.startswith(inner):
                yield name, parameter.detach()
        module.reshard()


class WrittenByParts:
    """A model in shards as `checkpoint.export` takes it: its weights go to the file as they are gathered.

    The first rank saves; each other one iterates over `gathered` meanwhile.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def save_pretrained(self, save_directory: str) -> None:
        folder, model = Path(save_directory), cast(Any, self._model)
        names, kinds = [name for name, _ in model.named_parameters()], set[torch.dtype]()
        with WeightFile(folder / "model.safetensors", names) as file:
            for name, weight in gathered(model):
                file.add(name, weight)
                kinds.add(weight.dtype)
        config = copy.deepcopy(model.config)
        (config.dtype,) = kinds
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def as_whole(model: PreTrainedModel) -> PreTrainedModel | WrittenByParts:
    """What can be saved in the Hugging Face layout, whether it is in shards or not."""
    return WrittenByParts(model) if isinstance(model, FSDPModule) else model


class WeightFiles:
    """The safetensors files of a model, of which any rows of any weight can be read."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError: there is none in `folder`."""
        self._files = _index(folder)
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def name_of(self, name: str, prefix: str) -> str | None:
        """The name of a weight here: a transformer alone lacks the prefix that it has under a head."""
        return next((n for n in (name, f"{prefix}.{name}") if n in self._files), None)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Raises ModelError: the file is damaged."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _safe_open(str(file), framework="pt")
        return self._open[file].get_slice(name)[start:stop]


@torch.no_grad()
def _fill(model: nn.Module, files: WeightFiles, sharding: Sharding, stored: torch.dtype) -> None:
    """Puts this rank's rows in place of the parameters on the meta device."""
    prefix = base_prefix(model)
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    for path, module in modules_by_name(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((f"{path}.{name}".lstrip("."), module, name))
    for parameter, places in owners.items():
        found = (files.name_of(full, prefix) for full, _, _ in places)
        name = next((name for name in found if name is not None), None)
        if name is None:
            raise ModelError(
                f"its safetensors files have no weight {places[0][0]}: sharded models are read under the "
                "names of the model's own parameters; take distributed.mode=replicated"
            )
        start, shape = first_row(parameter), own_rows(parameter).shape
        try:
            rows = files.rows(name, start, start + shape[0])
        except SafetensorError as error:
            raise ModelError(f"{name} cannot be read: {error}") from error
        if rows.shape != shape:
            raise ModelError(f"{name} has rows of {list(rows.shape[1:])}, the model {list(shape[1:])}")
        local = torch.empty(shape, dtype=stored, device=sharding.mesh.device_type)
        new = nn.Parameter(as_shard(local.copy_(rows), parameter), requires_grad=parameter.requires_grad)
        for _, module, own_name in places:
            module.register_parameter(own_name, new)


def _index(folder: Path) -> dict[str, Path]:
    """In which file each weight of a model folder lies. Raises ModelError: there is no safetensors file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not single.is_file():
        raise ModelError(f"{folder} has no safetensors files, which sharded models are read from")
    with _safe_open(str(single), framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
