"""Sharded models (FSDP2): each rank holds rows of every weight and gathers one layer at a time to compute.

The scheme is ZeRO stage 3 (arXiv:1910.02054 section 5), by torch's `fully_shard`. Between two passes a rank
holds its rows of every weight in float32, which are the optimizer's masters. A layer is gathered in the
compute type, used, and freed again. Gradients are summed in float32, and each rank keeps those of its rows.
With several groups of `shard_ranks` ranks (one per node, for example), every group holds the whole model, and
gradients are summed over the groups as well.

A model is opened on the meta device, and each rank reads its own rows from the safetensors files, so that no
rank ever holds more than its own rows and one layer.
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
from rlhf.models.pretrained import ModelError, base_prefix, empty_model, head_of, layer_classes, model_folder
from rlhf.models.vision.text_alone import text_alone
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
    """How models are sharded: the rows of weights are split over the last dimension of a mesh of ranks."""

    mesh: DeviceMesh
    computed: torch.dtype
    """The compute type, in which layers are gathered."""

    def exact(self) -> Sharding:
        """The same sharding with float32 as the compute type."""
        return replace(self, computed=torch.float32)

    @classmethod
    def of(cls, section: DistributedConfig, computed: torch.dtype, world: World) -> Sharding | None:
        """The sharding that the settings ask for; None where every rank holds the whole model.

        That is so with `distributed.mode=replicated` and on a single rank.
        """
        if section.mode == "replicated" or world.size == 1:
            return None
        ranks = shard_ranks(section, world.size)
        shape, names = (world.size // ranks, ranks), ("replicate", "shard")
        if shape[0] == 1:
            shape, names = shape[1:], names[1:]
        return cls(init_device_mesh(world.device.type, shape, mesh_dim_names=names), computed)


def shard_ranks(section: DistributedConfig, size: int) -> int:
    """Over how many of `size` ranks a model is sharded: `distributed.shard_ranks`, else those of one machine.

    Raises ValueError: `size` is not a multiple of it.
    """
    ranks = section.shard_ranks or min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    if size % ranks:
        raise ValueError(
            f"distributed.shard_ranks is {ranks}, but {size} ranks cannot be dealt to groups of {ranks}; set "
            "it to a divisor of the number of ranks"
        )
    return ranks


def open_policy(path: str, sharding: Sharding, *, trains: bool) -> PreTrainedModel:
    """The causal language model at `path`, in shards; these are stored in float32 if it `trains`.

    Every rank of the mesh calls it. Raises ModelError: there are no safetensors files, or they lack a weight.
    """
    stored = torch.float32 if trains else sharding.computed
    model, files = empty_model(path, stored, head=True), WeightFiles(model_folder(path))
    return _shard(model, files, sharding, stored=stored, trains=trains)


def open_scorer(path: str, sharding: Sharding) -> tuple[PreTrainedModel, Tensor | None]:
    """`pretrained.load_scorer` with the transformer in float32 shards; the score head's weight is whole."""
    model, files = empty_model(path, torch.float32, head=False), WeightFiles(model_folder(path))
    weight = files.rows(SCORE, 0, None).float() if SCORE in files else None
    return _shard(model, files, sharding, stored=torch.float32, trains=True), weight


def _shard(
    model: PreTrainedModel, files: WeightFiles, sharding: Sharding, *, stored: torch.dtype, trains: bool
) -> PreTrainedModel:
    """Shards an empty model layer by layer, and reads this rank's rows of its weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(trains)
    names = layer_classes(model)
    policy = fsdp.MixedPrecisionPolicy(param_dtype=sharding.computed, reduce_dtype=torch.float32)
    for module in [m for m in model.modules() if type(m).__name__ in names]:
        _fsdp.fully_shard(module, mesh=sharding.mesh, mp_policy=policy)
    _fsdp.fully_shard(model, mesh=sharding.mesh, mp_policy=policy)
    for module in _fsdp_modules(model):
        # losses are divided by global counts already, so gradients are added up instead of averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _fill(model, files, sharding, stored)
    register_backbone(model)
    return model.eval()


def register_backbone(model: Any) -> None:
    """Adds the backbone's forward to `model`, as a method for which FSDP gathers weights outside of layers.

    These include the head, which `token_stats` needs after it. They stay gathered until the backward pass.
    """

    def forward(**inputs: Any) -> Tensor:
        return transformer_of(model)(**inputs).last_hidden_state

    setattr(model, BACKBONE, forward)
    _fsdp.register_fsdp_forward_method(model, BACKBONE)


def backbone(model: Any, **inputs: Any) -> Tensor:
    """Last hidden states of a model, sharded or whole."""
    # weights that a pass without backward has left gathered may be older than the last update
    sharded = free_gathered(model)
    transformer = transformer_of(model)
    if sharded and transformer is not model:
        return getattr(model, BACKBONE)(**inputs)
    return transformer(**inputs).last_hidden_state


def transformer_of(model: Any) -> Any:
    """A model without its head; the model itself where it has none."""
    if text_alone(model.config):
        language = model.get_decoder()
        return language if head_of(language) is None else transformer_of(language)
    if model.base_model is not model or head_of(model) is None:
        return model.base_model
    # the class of some models names another attribute than that of its transformer
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)


def free_gathered(model: nn.Module) -> bool:
    """Frees the weights outside of layers that a pass without backward has gathered.

    Returns whether the model is sharded; a whole model is left as it is.
    """
    if not isinstance(model, FSDPModule):
        return False
    model.reshard()
    return True


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The modules whose weights FSDP gathers together: the model itself first, then its layers."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def in_step(items: Iterable[T], model: nn.Module, world: World) -> Iterator[T | None]:
    """Yields `items`, and then None until every rank has had as many; for a whole model only `items`.

    All ranks take part in each pass of a sharded model, so a rank with fewer items makes empty passes. Every
    rank calls it.
    """
    if not isinstance(model, FSDPModule):
        yield from items
        return
    own = list(items)
    most = max(world.gather(len(own)))
    yield from own
    yield from [None] * (most - len(own))


@torch.no_grad()
def gathered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight whole, in the compute type, under its Hugging Face name.

    A sharded model is gathered layer by layer, each layer in one collective, and freed when the next layer is
    asked for: a rank holds its rows and one layer. Every rank has to iterate to the end.
    """
    if not isinstance(model, FSDPModule):
        yield from model.named_parameters()
        return
    modules: dict[str, Any] = {n: m for n, m in modules_by_name(model).items() if isinstance(m, FSDPModule)}
    for prefix, module in modules.items():
        module.unshard()
        # weights of the layers inside of this module are yielded with their layer
        inner = tuple(f"{name}." for name in modules if name != prefix and name.startswith(prefix))
        for name, parameter in module.named_parameters(prefix=prefix):
            if not name.startswith(inner):
                yield name, parameter.detach()
        module.reshard()


class ShardedExport:
    """A sharded model with `save_pretrained`: its weights are written to the file while they are gathered.

    Rank 0 calls `save_pretrained`; meanwhile every other rank has to iterate over `gathered`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def save_pretrained(self, save_directory: str) -> None:
        folder, model = Path(save_directory), cast(Any, self._model)
        names, dtypes = [name for name, _ in model.named_parameters()], set[torch.dtype]()
        with WeightFile(folder / "model.safetensors", names) as file:
            for name, weight in gathered(model):
                file.add(name, weight)
                dtypes.add(weight.dtype)
        config = copy.deepcopy(model.config)
        (config.dtype,) = dtypes
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def as_whole(model: PreTrainedModel) -> PreTrainedModel | ShardedExport:
    """The model as an object whose `save_pretrained` writes all of it, whether it is sharded or not."""
    return ShardedExport(model) if isinstance(model, FSDPModule) else model


class WeightFiles:
    """The safetensors files of a model folder: reads any rows of any weight."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError: there are no safetensors files in `folder`."""
        self._files = _index(folder)
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def name_of(self, name: str, prefix: str) -> str | None:
        """The name in the files of the weight `name`, or None.

        The files of a model with a head have `prefix` before the names of its transformer.
        """
        return next((n for n in (name, f"{prefix}.{name}") if n in self._files), None)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows `[start, stop)` of a weight. Raises SafetensorError: the file is damaged."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _safe_open(str(file), framework="pt")
        return self._open[file].get_slice(name)[start:stop]


@torch.no_grad()
def _fill(model: nn.Module, files: WeightFiles, sharding: Sharding, stored: torch.dtype) -> None:
    """Replaces the parameters on the meta device by this rank's rows, read from the files.

    Raises ModelError: the files lack a weight, or one is damaged or of another shape.
    """
    for name, places in names_in_files(model, files).items():
        parameter = places[0][0].get_parameter(places[0][1])
        start, shape = first_row(parameter), own_rows(parameter).shape
        try:
            rows = files.rows(name, start, start + shape[0])
        except SafetensorError as error:
            raise ModelError(f"{name} cannot be read: {error}") from error
        if rows.shape != shape:
            raise ModelError(
                f"{name}: by config.json this rank's rows have shape {list(shape)}, in the safetensors files "
                f"{list(rows.shape)}; do the two belong to the same model?"
            )
        local = torch.empty(shape, dtype=stored, device=sharding.mesh.device_type)
        new = nn.Parameter(as_shard(local.copy_(rows), parameter), requires_grad=parameter.requires_grad)
        for module, own_name in places:
            module.register_parameter(own_name, new)


def names_in_files(model: nn.Module, files: WeightFiles) -> dict[str, list[tuple[nn.Module, str]]]:
    """The places of each parameter (a module, and its name there), by its name in the files.

    Tied weights are one parameter in several places. Raises ModelError: the files lack a weight.
    """
    prefix = base_prefix(model)
    owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for path, module in modules_by_name(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((f"{path}.{name}".lstrip("."), module, name))
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for places in owners.values():
        known = (files.name_of(full, prefix) for full, _, _ in places)
        name = next((name for name in known if name is not None), None)
        if name is None:
            raise ModelError(
                f"its safetensors files have no weight {places[0][0]}: sharded models are read under the "
                "names of the model's own parameters; take distributed.mode=replicated"
            )
        found[name] = [(module, own_name) for _, module, own_name in places]
    return found


def _index(folder: Path) -> dict[str, Path]:
    """The file of each weight of a model folder. Raises ModelError: there are no safetensors files."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not single.is_file():
        raise ModelError(f"{folder} has no safetensors files, which sharded models are read from")
    with _safe_open(str(single), framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
