"""Replaces what vLLM's weight transfer needs of a GPU by equivalents on a CPU, in both processes.

NCCL's broadcast becomes gloo's, a handle of CUDA memory becomes the name of shared memory, streams do
nothing. Everything else of both ends is vLLM's own: order and content of requests, and how weights are
packed, cut into pieces, unpacked and loaded. So both sides are shown to agree, but NCCL and CUDA IPC
themselves are not tested.
"""

from __future__ import annotations

import datetime
import importlib
import math
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GPU = "GPU-of-a-test"
PREFIX = "tandem-test-"
NAMES: dict[int, str] = {}
"""Names of shared memory by the address at which it is mapped."""
HANG = datetime.timedelta(seconds=120)


class Stream:
    def synchronize(self) -> None: ...


class Gloo:
    """Stands in for vLLM's `PyNcclCommunicator`: two processes that meet through vLLM's own store."""

    def __init__(self, host: str, port: int, rank: int, size: int, device: Any) -> None:
        utils: Any = importlib.import_module("vllm.distributed.utils")
        self.met = utils.StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=size)
        module: Any = dist
        store = module.PrefixStore("gloo", self.met.store)
        self.group: Any = module.ProcessGroupGloo(store, rank, size, HANG)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        self.group.broadcast([tensor], _options(src)).wait()

    def destroy(self) -> None:
        self.group = self.met = None


def _options(src: int) -> Any:
    module: Any = dist
    options = module.BroadcastOptions()
    options.rootRank, options.rootTensor = src, 0
    return options


def shared_bytes(size: int) -> Tensor:
    """Allocates shared memory on the sending side."""
    path = Path("/dev/shm") / f"{PREFIX}{uuid.uuid4().hex}"
    path.write_bytes(bytes(size))
    tensor = _mapped(path)
    NAMES[tensor.data_ptr()] = path.name
    return tensor


def _mapped(path: Path) -> Tensor:
    with path.open("r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


def reduce_tensor(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The fifteen arguments that torch gives for memory of a GPU."""
    name = NAMES[tensor.data_ptr()].encode()
    kind, storage = torch.Tensor, torch.storage.TypedStorage
    memory = (name, tensor.nbytes, 0, False, b"counter", 3, b"event", True)
    return None, (kind, tensor.size(), tensor.stride(), 0, storage, tensor.dtype, 0, *memory)


def rebuild_cuda_tensor(*arguments: Any) -> Tensor:
    """Maps shared memory on the receiving side, after checking its arguments as torch does."""
    kind, size, stride, offset, storage, dtype, device, name, length, at, learns, *rest = arguments
    assert (kind, stride, offset, dtype) == (torch.Tensor, (1,), 0, torch.uint8)
    assert (storage, device, at, learns) == (torch.storage.TypedStorage, None, 0, False)
    assert rest == [b"counter", 3, b"event", True] and math.prod(size) == length
    return _mapped(Path("/dev/shm") / name.decode())


class CPUTorch:
    """Stands in for the module `torch` in vLLM's packing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, dtype: torch.dtype, device: Any) -> Tensor:
        return shared_bytes(*size) if device == "cuda" else torch.empty(*size, dtype=dtype, device=device)


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Object, name of its attribute, and replacement of the attribute."""
    folder = "vllm.distributed.weight_transfer"
    packed: Any = importlib.import_module(f"{folder}.packed_tensor")
    nccl: Any = importlib.import_module(f"{folder}.nccl_common")
    reductions: Any = importlib.import_module("torch.multiprocessing.reductions")
    yield packed, "_get_streams", lambda device, count: (Stream(),) * count
    yield packed, "torch", CPUTorch()
    yield packed, "reduce_tensor", reduce_tensor
    yield reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor
    yield nccl, "stateless_init_process_group", Gloo
    yield torch.accelerator, "current_device_index", lambda: 0
    yield torch.accelerator, "synchronize", lambda: None
    yield torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(uuid=GPU)
    yield torch.cuda, "stream", lambda stream: nullcontext()
    yield torch.cuda, "current_stream", Stream
    yield torch.cuda, "ipc_collect", lambda: None


def forget_shared_bytes() -> None:
    for path in Path("/dev/shm").glob(f"{PREFIX}*"):
        os.unlink(path)
