"""Sends a LoRA adapter to vLLM unmerged: the base weights once, then only the two factors of each layer.

    y = W x + B (A x)          B already contains the factor alpha / rank

vLLM reads an adapter from a folder in peft's layout, here in shared memory. It has one name for the whole
run: an adapter that is loaded under the name of the last one replaces it, for samples in flight too.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.engine import AdaptedSource, SyncError, WeightSource
from rlhf.rollout.weight_proof import Holder, Proven, prove

ADAPTER_NAME, ADAPTER_ID = "tandem", 1
"""Name and id of the adapter in vLLM."""
BUFFER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Possible ranks of vLLM's buffers for adapters (`max_lora_rank`)."""
SHARED_MEMORY = Path("/dev/shm")


def adapted_source(source: WeightSource, rank: int) -> AdaptedSource | None:
    """`source` if it has an adapter apart and the engine was started for one (`rank` above 0), else None."""
    return source if rank and isinstance(source, AdaptedSource) else None


def lora_engine_args(rank: int) -> dict[str, Any]:
    """Arguments of vLLM's engine for an unmerged adapter of that rank; none if it is 0."""
    if not rank:
        return {}
    buffer_rank = next(size for size in BUFFER_RANKS if size >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": buffer_rank}


def adapter_request(folder: str) -> Any:
    """The adapter of a request to the engine in this process."""
    return importlib.import_module("vllm.lora.request").LoRARequest(ADAPTER_NAME, ADAPTER_ID, folder)


def folder_for_adapter() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(
        prefix="tandem-adapter-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    )


def write_adapter(folder: Path, adapter: WeightSource, dtype: torch.dtype) -> int:
    """Writes the adapter in peft's layout; returns the bytes of its factors."""
    factors: dict[str, Tensor] = {
        f"base_model.model.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in adapter.named_tensors()
    }
    rank = max(len(factor) for name, factor in factors.items() if ".lora_A." in name)
    layers = sorted({name.split(".")[-3] for name in factors})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers}
    folder.mkdir(parents=True, exist_ok=True)
    library: Any = importlib.import_module("safetensors.torch")
    library.save_file(factors, folder / "new")
    (folder / "new").replace(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return sum(factor.nbytes for factor in factors.values())


def prove_adapted(
    engine: str, holder: Holder, source: AdaptedSource, version: int, dtype: torch.dtype
) -> Proven:
    """Compares base and adapter. Raises SyncError for a difference or a layer that vLLM does not adapt."""
    base = prove(engine, holder, source.base, version, dtype)
    adapter = prove(engine, holder, source.adapter, version, dtype)
    if adapter.unread:
        raise SyncError(
            f"{engine} has no adapter for {adapter.unread[0].rpartition('.lora_')[0]} "
            f"({len(adapter.unread)} factors in all): set rollout.vllm.lora=merged, or remove the layer from "
            "model.lora.targets"
        )
    return Proven(base.compared + adapter.compared, base.unread, {**base.expected, **adapter.expected})


def held_factor(manager: Any, module: object, slot: int, name: str) -> Iterator[tuple[str, Tensor]]:
    """The factor `name` with which a layer of vLLM's worker computes; yields nothing if it is not adapted.

    `slot` is the index of the adapted weight among those stacked in the layer (such as q, k and v).
    """
    side = "lora_a_stacked" if ".lora_A." in name else "lora_b_stacked"
    held: dict[str, Any] = vars(module)
    if side not in held:
        return
    if ADAPTER_ID not in manager.lora_index_to_id:
        yield "the adapter", torch.zeros(0)
        return
    rank = manager.get_adapter(ADAPTER_ID).rank
    factor: Tensor = held[side][slot][manager.lora_index_to_id.index(ADAPTER_ID), 0]
    yield "the adapter", factor[:rank] if side == "lora_a_stacked" else factor[:, :rank]
