"""LoRA: a low-rank adapter beside each linear layer is trained, and the model's own weights stay frozen.

    y = W x + (alpha / rank) B A x          A [rank, in], B [out, rank], B = 0 at the start

(arXiv:2106.09685 section 4.1; the layers are those of peft.) The frozen weights serve three purposes: with
the adapter they are the policy; with the adapter switched off they are the reference of a KL; and
`Adapter.merged`, which the engine samples from, shares every tensor with the policy except the adapted
weights, of which it holds W + (alpha / rank) B A. The language-model head and the embeddings have no adapter.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config.model import LoraConfig
from rlhf.distributed.world import derive_seed
from rlhf.models.attention import attention_of, set_attention
from rlhf.models.pretrained import ModelError, head_of
from rlhf.rollout.learner_module import exact_attention
from rlhf.torch_typed import modules_by_name, seeded

log = logging.getLogger(__name__)

NOT_CALLED = "its weight is used without calling the layer"
NAME = "default"
"""Name of the adapter within the names of its weights; peft leaves it out of the files it writes."""


class Adapter:
    """A LoRA adapter on `model`, which is changed in place: peft's layers replace the adapted linear ones.

    Raises ModelError: a target is not a linear layer of the model.
    """

    def __init__(self, model: PreTrainedModel, section: LoraConfig, *, seed: int) -> None:
        # imported here because it is an optional dependency; its annotations are too incomplete for pyright
        peft: Any = importlib.import_module("peft")
        targets, left_out = _targets(model, section.targets)
        for sentence in (frozen_experts(model), left_out):
            if sentence:
                log.warning("%s: %s", model.name_or_path, sentence)
        # sharing the parameter objects means that casting the model's weights casts those of `merged` too
        self.merged = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self.base_model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        """The model without the adapter, of the same weights: what an engine samples the reference from."""
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
        """Within this context the model computes without the adapter."""
        with self.peft.disable_adapter():
            yield

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """A and B of every layer, by name."""
        return {name: weight for name, weight in self._model.named_parameters() if ".lora_" in name}

    @contextmanager
    def holding(self, weights: Mapping[str, nn.Parameter]) -> Generator[None]:
        """Within this context the adapter has other A and B.

        A backward belongs into it as well as its forward, because checkpointed layers run the forward again.
        The gradient is right in any case of layers that are not: the parameters themselves are exchanged, and
        a graph knows its own. (peft's `set_adapter` takes `requires_grad` from the weights of the adapter
        that it leaves, by which PyTorch silently drops their gradient in graphs that are there already.)
        """
        before = self.exchange(weights)
        try:
            yield
        finally:
            self.exchange(before)

    def exchange(self, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Puts other A and B in the place of the present ones, which are returned."""
        before = self.weights
        for name, weight in weights.items():
            layer, _, last = name.rpartition(".")
            self._model.get_submodule(layer).register_parameter(last, weight)
        return before

    @torch.no_grad()
    def merge(self, into: PreTrainedModel | None = None) -> None:
        """Writes W + (alpha / rank) B A into `merged`, from the present A and B, in the compute type.

        `into`: another model like `base_model`, which is written to instead.
        """
        for name, layer in self._layers.items():
            target = (self.merged if into is None else into).get_submodule(name)
            base = layer.get_base_layer().weight
            weight = _merged(base, layer)
            if target.get_parameter("weight") is base:
                target.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            else:
                target.get_parameter("weight").copy_(weight)

    @torch.no_grad()
    def outdated(self) -> tuple[str, float] | None:
        """The first layer whose weight in `merged` differs from what `merge` would write now, and how much.

        None: `merged` is up to date. The difference is the largest of any element.
        """
        for name, layer in self._layers.items():
            current = _merged(layer.get_base_layer().weight, layer)
            held = self.merged.get_submodule(name).get_parameter("weight")
            if not torch.equal(held, current):
                return name, (held.float() - current.float()).abs().max().item()
        return None

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The frozen weights, under the names that they have in the model without an adapter."""
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


def _targets(model: PreTrainedModel, wanted: Sequence[str]) -> tuple[list[str], str | None]:
    """Names of the layers to adapt, for peft: each is the end of a module's path, or the whole path.

    Without `wanted` names, every linear layer below the head that can have an adapter; and a sentence about
    the others. Raises ModelError: a name fits no such layer, or there is none at all.
    """
    modules, linears = modules_by_name(model), linear_layers(model, wanted)
    last = sorted({name.rpartition(".")[2] for name in linears})
    called = _called(model, {name: modules[name] for name in linears})
    reasons: dict[str, str | None] = {}
    for target in wanted or last:
        used = called & _ending_in(target, linears)
        reasons[target] = _refused_by_peft(model, target) if used else NOT_CALLED
    refused = {target: reason for target, reason in reasons.items() if reason}
    told = "; ".join(f"{target} gets no adapter: {reason}" for target, reason in refused.items())
    if wanted and refused:
        raise ModelError(f"model.lora.targets: {told}")
    targets: set[str] = set()
    for target in reasons.keys() - refused.keys():
        named = _ending_in(target, linears)
        # full paths where the short name would also match other modules, such as a vision tower's
        # convolutions
        targets |= {target} if named == _ending_in(target, modules) else named
    if not targets:
        raise ModelError(
            f"model.lora is set, but {type(model).__name__} has no linear layer below its head that can have "
            f"an adapter{': ' if told else ''}{told}; train the whole model"
        )
    return sorted(targets), told or None


def without_adapter(model: PreTrainedModel, wanted: Sequence[str]) -> str | None:
    """A sentence about linear layers that get no adapter; None: there are none. The model's weights need no
    contents. Raises ModelError where `Adapter` does.
    """
    return _targets(model, wanted)[1]


def adapter_shapes(model: PreTrainedModel, section: LoraConfig) -> dict[str, tuple[int, int]]:
    """The shapes of A and B of every layer, by the names of `Adapter.weights`. The model's weights need no
    contents. Raises ModelError where `Adapter` does.
    """
    modules, linears = modules_by_name(model), linear_layers(model, section.targets)
    targets, _ = _targets(model, section.targets)
    shapes: dict[str, tuple[int, int]] = {}
    for name in {name for target in targets for name in _ending_in(target, linears)}:
        layer = modules[name]
        assert isinstance(layer, nn.Linear)
        shapes[f"{name}.lora_A.{NAME}.weight"] = (section.rank, layer.in_features)
        shapes[f"{name}.lora_B.{NAME}.weight"] = (layer.out_features, section.rank)
    return shapes


def linear_layers(model: PreTrainedModel, wanted: Sequence[str]) -> set[str]:
    """The paths of the linear layers below the head. Raises ModelError: none has a name of `wanted`."""
    head, modules = head_of(model), modules_by_name(model)
    linears = {n for n, m in modules.items() if isinstance(m, nn.Linear) and _multiplies(m)}
    linears -= {n for n in linears if modules[n] is head}
    last = sorted({name.rpartition(".")[2] for name in linears})
    for target in wanted:
        if not _ending_in(target, linears):
            near = difflib.get_close_matches(target, last, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ModelError(
                f"model.lora.targets has {target!r}, which is no linear layer of {type(model).__name__} "
                f"below its head{hint} There are: {', '.join(last)}"
            )
    return linears


@torch.no_grad()
def _multiplies(layer: nn.Linear) -> bool:
    """Whether a layer that learns computes W x + b; those of a subclass may compute something else."""
    if not layer.weight.requires_grad:
        return False
    if type(layer).forward is nn.Linear.forward:
        return True
    weight, bias = layer.weight, layer.bias
    if weight.is_meta:
        # any contents tell as well: of a layer whose own were not loaded
        layer = copy.deepcopy(layer).to_empty(device="cpu")
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1.0, 1.0, parameter.numel()).view_as(parameter))
        weight, bias = layer.weight, layer.bias
    x = torch.linspace(-1.0, 1.0, layer.in_features, dtype=weight.dtype, device=weight.device)[None]
    try:
        return torch.allclose(layer(x), nn.functional.linear(x, weight, bias), atol=1e-3)
    except Exception:
        # the code of a model may fail in any way with such inputs
        return False


@torch.no_grad()
def _called(model: Any, layers: Mapping[str, nn.Module]) -> set[str]:
    """The names of those layers that a forward pass calls, and does not only take the weights of.

    All of them where the model has no contents (meta device), and its code asks for some.
    """
    names: set[str] = set()

    def note(name: str, *_: object) -> None:
        names.add(name)

    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
    before = attention_of(model)
    set_attention(model, exact_attention(model))
    ids = torch.arange(2, 8, device=model.device)[None]
    try:
        if model.device.type != "meta":
            model(input_ids=ids, use_cache=False)
        elif not _passes_without_contents(model, ids):
            return set(layers)
    finally:
        set_attention(model, before)
        for hook in hooks:
            hook.remove()
    return names


def _passes_without_contents(model: Any, ids: Tensor) -> bool:
    """Whether a forward pass on the meta device comes to its end, with one of three masks.

    Code of transformers looks into the first two for padding, or for several sequences in a row.
    """
    n = ids.shape[1]
    for mask in (None, torch.ones_like(ids), torch.zeros(1, 1, n, n, device=ids.device)):
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception:
            # the code of a model may fail in any way where tensors have no contents
            continue
        return True
    return False


def _refused_by_peft(model: PreTrainedModel, target: str) -> str | None:
    """Why peft does not put adapters beside the layers of that name; None: it does."""
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(target_modules=[target])
    config.peft_type = peft.PeftType.LORA
    tuners: Any = importlib.import_module("peft.tuners.tuners_utils")
    check: Any = tuners.__dict__.get("_check_lora_target_modules_mamba")
    try:
        if check is not None:
            check(config, model, target)
    except ValueError:
        return NOT_CALLED
    if importlib.util.find_spec("peft.utils.transformers_weight_conversion") is not None:
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
        with suppress(ValueError):
            conversion.convert_peft_config_for_transformers(config, model, None)
            if target in config.target_modules:
                return None
        return "peft takes layers of this name for experts"
    return None


def frozen_experts(model: PreTrainedModel) -> str | None:
    """A sentence about the experts of a mixture that get no adapter; None: there are none.

    transformers holds the matrices of all experts of a layer in one parameter of three dimensions, which no
    linear layer computes with.
    """
    last: set[str] = set()
    held = total = 0
    for module in modules_by_name(model).values():
        for name, weight in module.named_parameters(recurse=False):
            total += weight.numel()
            # convolutions have weights of three dimensions too
            several = weight.dim() == 3 and len(weight) > 1 and weight.requires_grad
            if several and "bias" not in name and "Conv" not in type(module).__name__:
                last.add(name)
                held += weight.numel()
    if not last:
        return None
    return (
        f"the experts' weights ({', '.join(sorted(last))}; {held / total:.0%} of all) are no linear layers: "
        "they get no adapter and stay frozen"
    )


def _ending_in(target: str, names: Iterable[str]) -> set[str]:
    """The paths among `names` whose last parts are `target`."""
    return {name for name in names if name == target or name.endswith(f".{target}")}
