"""A LoRA adapter sent to vLLM by itself: what it stands on once, then its two factors a layer.

    y = W x + B (A x)          alpha / rank is in B already

vLLM reads an adapter from a folder in peft's layout, which stands in shared memory and has one name for the
whole run: what is loaded again under a name in use takes its place, also for samples in flight.
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

NAME, NUMBER = "tandem", 1
"""Of the adapter, in vLLM."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes of vLLM's buffers for factors."""
SHARED_MEMORY = Path("/dev/shm")


def in_parts(source: WeightSource, rank: int) -> AdaptedSource | None:
    """The parts of a source, for an engine that was started for an adapter of that rank; 0: for none."""
    return source if rank and isinstance(source, AdaptedSource) else None


def room_for(rank: int) -> dict[str, Any]:
    """Arguments of vLLM's engine for an adapter of that rank; 0: for none."""
    if not rank:
        return {}
    room = next(size for size in RANKS if size >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def adapter_request(folder: str) -> Any:
    """What a request to an engine of this process asks for."""
    return importlib.import_module("vllm.lora.request").LoRARequest(NAME, NUMBER, folder)


def folder_for_adapter() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(
        prefix="tandem-adapter-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    )


def write_adapter(folder: Path, adapter: WeightSource, dtype: torch.dtype) -> int:
    """Bytes of its factors."""
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


def prove_parts(
    engine: str, holder: Holder, source: AdaptedSource, version: int, dtype: torch.dtype
) -> Proven:
    """Of both. Raises SyncError naming what differs, or a layer that vLLM gives no adapter to."""
    base = prove(engine, holder, source.base, version, dtype)
    adapter = prove(engine, holder, source.adapter, version, dtype)
    if adapter.unread:
        raise SyncError(
            f"{engine} has no adapter for {adapter.unread[0].rpartition('.lora_')[0]} "
            f"({len(adapter.unread)} factors in all): take rollout.vllm.lora=merged, or leave the layer out "
            "of model.lora.targets"
        )
    return Proven(base.compared + adapter.compared, base.unread, {**base.expected, **adapter.expected})


def held_factor(manager: Any, module: object, slot: int, name: str) -> Iterator[tuple[str, Tensor]]:
    """What a layer computes with of the factor `name`, as vLLM's worker holds it; nothing: it has no adapter.

    `slot`: of the weights that are stacked in the layer.
    """
    side = "lora_a_stacked" if ".lora_A." in name else "lora_b_stacked"
    held: dict[str, Any] = vars(module)
    if side not in held:
        return
    if NUMBER not in manager.lora_index_to_id:
        yield "the adapter", torch.zeros(0)
        return
    rank = manager.get_adapter(NUMBER).rank
    factor: Tensor = held[side][slot][manager.lora_index_to_id.index(NUMBER), 0]
    yield "the adapter", factor[:rank] if side == "lora_a_stacked" else factor[:, :rank]
