"""The extension of vLLM's workers: loads the learner's weights, and reads back those it computes with.

vLLM mixes `HeldWeights` into its worker class (`worker_extension_cls`) and calls the methods by name, in this
process or in a server's. On a CPU vLLM packs the weight of a linear layer for oneDNN and keeps no other copy.
Layers that are reloaded are packed again, except a head that is tied to the embedding: it gets no weight of
its own, so its packed copy would stay the old one.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.rollout.vllm.adapter import ADAPTER_ID, ADAPTER_NAME, held_factor
from rlhf.rollout.vllm.device_transport import rebuilding_arguments
from rlhf.rollout.vllm.transport import gpu_of
from rlhf.rollout.weight_proof import columns, compared_share, digest

PARAMETER, PACKED = "the parameter", "the packed copy"


class HeldWeights:
    """Methods of a vLLM worker; arguments and results are plain data, except tensors from this process."""

    def tandem_load(self: Any, weights: Any = None, path: str | None = None) -> list[int]:
        """Loads weights in the Hugging Face layout: `(name, tensor)` pairs, or the file at `path`."""
        pairs = weights if path is None else _saved(path)
        self.reload_weights(weights_iterator=iter(pairs))
        self.tandem_pack_head()
        return [0]

    def tandem_pack_head(self: Any) -> list[int]:
        """Packs the heads again, on a CPU."""
        platforms: Any = importlib.import_module("vllm.platforms")
        embeddings: Any = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
        heads = embeddings.ParallelLMHead if platforms.current_platform.is_cpu() else ()
        for module in self.model_runner.get_model().modules():
            if isinstance(module, heads):
                module.quant_method.process_weights_after_loading(module)
        return [0]

    def tandem_transport(self: Any) -> dict[str, str]:
        """The transport that the server was started for, and its GPU; each empty if there is none."""
        config, device = self.vllm_config.weight_transfer_config, self.device
        gpu = gpu_of(device) if device.type == "cuda" else ""
        return {"backend": "" if config is None else config.backend, "gpu": gpu}

    def tandem_take(self: Any, update_info: dict[str, Any], handles: dict[str, Any]) -> list[int]:
        """Calls vLLM's `update_weights` with handles of the learner's memory, made from plain numbers."""
        rebuilt = {gpu: rebuilding_arguments(plain) for gpu, plain in handles.items()}
        self.update_weights({**update_info, "ipc_handles": rebuilt})
        return [0]

    def tandem_adapter(self: Any, path: str) -> list[int]:
        """Loads the adapter of a folder in place of the last one. Raises ValueError if there are others."""
        requests: Any = importlib.import_module("vllm.lora.request")

        manager = self.model_runner.lora_manager
        if not set(manager.list_adapters()) <= {ADAPTER_ID}:
            raise ValueError("adapters that are not of this run are loaded already")
        manager.add_adapter(requests.LoRARequest(ADAPTER_NAME, ADAPTER_ID, path, load_inplace=True))
        return [0]

    @torch.no_grad()
    def tandem_digests(self: Any, names: Sequence[str], version: int) -> dict[str, dict[str, str]]:
        runner, dtype = self.model_runner, self.model_config.dtype
        return {
            # vLLM widens the dtype of a bias for some kernels; converting it back is exact
            name: {copy: digest(part.to(dtype)) for copy, part in _copies(runner, name, version).items()}
            for name in names
        }

    @torch.no_grad()
    def tandem_part(self: Any, name: str, copy: str, version: int) -> list[Any]:
        """The compared share of one copy: its shape, and its float32 numbers in base64."""
        part = _copies(self.model_runner, name, version)[copy].float().cpu().contiguous()
        return [list(part.shape), base64.b64encode(part.numpy().tobytes()).decode()]


def _saved(path: str) -> Iterator[tuple[str, Tensor]]:
    safetensors: Any = importlib.import_module("safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def _copies(runner: Any, name: str, version: int) -> dict[str, Tensor]:
    """The compared share of each copy of a weight; empty if the weight cannot be read."""
    model = runner.get_model()
    if ".lora_" in name:
        place = _place(model, name.partition(".lora_")[0] + ".weight")
        if place is None:
            return {}
        manager = runner.lora_manager._adapter_manager
        held = held_factor(manager, place[0], place[2] or 0, name)
        return {copy: compared_share(factor, version) if factor.numel() else factor for copy, factor in held}
    found = _locate(model, name)
    if found is None:
        return {}
    module, parameter, shard = found
    weight: Tensor = module.get_parameter(parameter)
    packed = cast(dict[str, Any], vars(module)).get("cpu_linear") if parameter == "weight" else None
    shares: dict[str, Tensor] = {}
    if weight.numel():
        shares[PARAMETER] = compared_share(_rows(module, weight.data, shard), version)
    if packed is not None:
        width = weight.shape[1] if weight.numel() else module.input_size
        read = _through_product(packed, weight, width, version)
        shares[PACKED] = _rows(module, read.t(), shard).t()
    return shares


def _through_product(packed: Any, weight: Tensor, width: int, version: int) -> Tensor:
    """The compared rows of the transposed weight, as products with unit vectors, whose sums are exact."""
    chosen = torch.arange(width)[columns(width, version)]
    unit = torch.zeros(len(chosen), width, dtype=weight.dtype)
    unit[torch.arange(len(chosen)), chosen] = 1.0
    return packed(unit, weight, None)


def _locate(model: Any, name: str) -> tuple[Any, str, int | None] | None:
    """Module and parameter of a Hugging Face name, and its index if several weights are stacked in it."""
    place = _place(model, name)
    if place is None:
        return None
    module, parameter, shard = place
    # a layer that is wrapped for an adapter
    module = module.base_layer if hasattr(module, "base_layer") else module
    # experts cannot be read: vLLM stacks them in other parameters
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
    """Which weights vLLM stacks in one, by the mappings of the modules on the path (models, submodels)."""
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
    """The rows of one weight, out of several stacked ones or without padding."""
    if shard is None:
        return weight[: module.org_vocab_size] if hasattr(module, "org_vocab_size") else weight
    sizes = module.output_partition_sizes
    return weight[sum(sizes[:shard]) : sum(sizes[: shard + 1])]
