"""The device of this process, the GPUs it may use, and how the CPU's memory allocator treats freed memory.

By default, glibc returns large blocks and the top of the heap to the system when they are freed, and the
system clears every page of them before it hands them out again. A training step frees and allocates the same
gigabytes each time: about a sixth of its time was spent on that (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""The parameters M_TRIM_THRESHOLD and M_MMAP_MAX of `mallopt`, from malloc.h."""
_NEVER = -1


def this_device() -> torch.device:
    """The GPU of this process (numbered by LOCAL_RANK), or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES, in that order."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]


def keep_freed_memory() -> None:
    """From now on this process keeps the memory that it frees. Does nothing without glibc."""
    for libc in _glibc():
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_memory() -> None:
    """Returns memory that is free now to the system: call it after a large allocation that will not recur."""
    for libc in _glibc():
        libc.malloc_trim(0)


def _glibc() -> list[ctypes.CDLL]:
    """The C library in a list, or an empty list where it is not glibc."""
    return [ctypes.CDLL(None)] if platform.libc_ver()[0] == "glibc" else []
