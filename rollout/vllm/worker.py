"""What runs inside vLLM's workers: takes weights, and says which ones the worker really computes with.

vLLM mixes `HeldWeights` into its worker class (`worker_extension_cls`) and calls the methods by name, in this
process or in one of its own. On a CPU vLLM packs the weight of a linear layer for oneDNN and keeps no other
copy; the layers it reloads are packed anew, except the head of a model whose head is its embedding: that
one gets no weight of its own, and would keep the products of the old one.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.rollout.vllm.adapter import NAME, NUMBER, held_factor
from rlhf.rollout.vllm.device_transport import rebuilding_arguments
from rlhf.rollout.vllm.transport import gpu_of
from rlhf.rollout.weight_proof import columns, digest, looked_at

PARAMETER, PACKED = "the parameter", "the packed copy"


class HeldWeights:
    """Methods of a vLLM worker. Everything they take and return is plain, but for weights of this process."""

    def tandem_load(self: Any, weights: Any = None, path: str | None = None) -> list[int]:
        """Takes `(name, tensor)` pairs in the order and under the names of Hugging Face, or such a file."""
        pairs = weights if path is None else _saved(path)
        self.reload_weights(weights_iterator=iter(pairs))
        self.tandem_pack_head()
        return [0]

    def tandem_pack_head(self: Any) -> list[int]:
        platforms: Any = importlib.import_module("vllm.platforms")
        embeddings: Any = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
        heads = embeddings.ParallelLMHead if platforms.current_platform.is_cpu() else ()
        for module in self.model_runner.get_model().modules():
            if isinstance(module, heads):
                module.quant_method.process_weights_after_loading(module)
        return [0]

    def tandem_transport(self: Any) -> dict[str, str]:
        """How it was started to be given weights, and its GPU; empty where there is none."""
        config, device = self.vllm_config.weight_transfer_config, self.device
        gpu = gpu_of(device) if device.type == "cuda" else ""
        return {"backend": "" if config is None else config.backend, "gpu": gpu}

    def tandem_take(self: Any, update_info: dict[str, Any], handles: dict[str, Any]) -> list[int]:
        """vLLM's `update_weights`, of memory on the learner's side that is named in plain numbers."""
        rebuilt = {gpu: rebuilding_arguments(plain) for gpu, plain in handles.items()}
        self.update_weights({**update_info, "ipc_handles": rebuilt})
        return [0]

    def tandem_adapter(self: Any, path: str) -> list[int]:
        """Takes the adapter of a folder, in place of the one before. Raises ValueError: there are others."""
        requests: Any = importlib.import_module("vllm.lora.request")

        manager = self.model_runner.lora_manager
        if not set(manager.list_adapters()) <= {NUMBER}:
            raise ValueError("adapters that are not of this run are loaded already")
        manager.add_adapter(requests.LoRARequest(NAME, NUMBER, path, load_inplace=True))
        return [0]

    @torch.no_grad()
    def tandem_digests(self: Any, names: Sequence[str], version: int) -> dict[str, dict[str, str]]:
        runner, dtype = self.model_runner, self.model_config.dtype
        return {
            # vLLM widens a bias for some kernels, which loses nothing
            name: {copy: digest(part.to(dtype)) for copy, part in _copies(runner, name, version).items()}
            for name in names
        }

    @torch.no_grad()
    def tandem_part(self: Any, name: str, copy: str, version: int) -> list[Any]:
        """Shape, and float32 numbers in base64."""
        part = _copies(self.model_runner, name, version)[copy].float().cpu().contiguous()
        return [list(part.shape), base64.b64encode(part.numpy().tobytes()).decode()]


def _saved(path: str) -> Iterator[tuple[str, Tensor]]:
    safetensors: Any = importlib.import_module("safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def _copies(runner: Any, name: str, version: int) -> dict[str, Tensor]:
    """The compared share of each copy of a weight; empty when there is no way to read it."""
    model = runner.get_model()
    if ".lora_" in name:
        place = _place(model, name.partition(".lora_")[0] + ".weight")
        if place is None:
            return {}
        manager = runner.lora_manager._adapter_manager
        held = held_factor(manager, place[0], place[2] or 0, name)
        return {copy: looked_at(factor, version) if factor.numel() else factor for copy, factor in held}
    found = _locate(model, name)
    if found is None:
        return {}
    module, parameter, shard = found
    weight: Tensor = module.get_parameter(parameter)
    packed = cast(dict[str, Any], vars(module)).get("cpu_linear") if parameter == "weight" else None
    shares: dict[str, Tensor] = {}
    if weight.numel():
        shares[PARAMETER] = looked_at(_rows(module, weight.data, shard), version)
    if packed is not None:
        width = weight.shape[1] if weight.numel() else module.input_size
        read = _through_product(packed, weight, width, version)
        shares[PACKED] = _rows(module, read.t(), shard).t()
    return shares


def _through_product(packed: Any, weight: Tensor, width: int, version: int) -> Tensor:
    """Rows of the transposed weight, as the product with unit vectors: a sum with one term is exact."""
    chosen = torch.arange(width)[columns(width, version)]
    unit = torch.zeros(len(chosen), width, dtype=weight.dtype)
    unit[torch.arange(len(chosen)), chosen] = 1.0
    return packed(unit, weight, None)


def _locate(model: Any, name: str) -> tuple[Any, str, int | None] | None:
    """The module and parameter of a Hugging Face name, and which of the weights stacked in it that is."""
    place = _place(model, name)
    if place is None:
        return None
    module, parameter, shard = place
    # under an adapter
    module = module.base_layer if hasattr(module, "base_layer") else module
    # experts are stacked along an axis of their own
    if parameter not in dict(module.named_parameters(recurse=False)):
        return None
    return module, parameter, shard


def _place(model: Any, name: str) -> tuple[Any, str, int | None] | None:
    renamed = model.hf_to_vllm_mapper.get_rename_mapper().map_name(name) if _renames(model) else name
    if renamed is None:
        return None
    path, _, parameter = str(renamed).rpartition(".")
    parent, _, leaf = path.rpartition(".")
    shard = None
    for stacked, leaves in _stacks(model, path):
        if leaf in leaves and len(leaves) > 1:
            path, shard = (f"{parent}.{stacked}" if parent else stacked), leaves.index(leaf)
    try:
        return model.get_submodule(path), parameter, shard
    except AttributeError:
        return None


def _stacks(model: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Weights that stand in one, as the modules on the way say: the model, or the language model in it."""
    module = model
    for part in (*path.split("."), None):
        if hasattr(module, "packed_modules_mapping"):
            yield from module.packed_modules_mapping.items()
        module = dict(module.named_children()).get(part)
        if module is None:
            return


def _renames(model: Any) -> bool:
    return hasattr(model, "hf_to_vllm_mapper") and model.hf_to_vllm_mapper is not None


def _rows(module: Any, weight: Tensor, shard: int | None) -> Tensor:
    """Those of one weight, of several stacked or padded ones."""
    if shard is None:
        return weight[: module.org_vocab_size] if hasattr(module, "org_vocab_size") else weight
    sizes = module.output_partition_sizes
    return weight[sum(sizes[:shard]) : sum(sizes[: shard + 1])]
