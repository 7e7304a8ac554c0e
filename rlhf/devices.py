"""What the C library does with freed memory on a CPU: keep it for the next step, or give it back.

As delivered, glibc gives large blocks and the top of the heap back to the system when they are freed, and the
system clears every page of them when they are asked for again. A training step frees and asks for the same
gigabytes each time: about a sixth of its seconds went there (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of `mallopt`, from malloc.h."""
_NEVER = -1


def keep_freed_memory() -> None:
    """From here on this process keeps what it frees; elsewhere than with glibc nothing happens."""
    for libc in _glibc():
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_memory() -> None:
    """What is free right now, after something large that does not come again."""
    for libc in _glibc():
        libc.malloc_trim(0)


def _glibc() -> list[ctypes.CDLL]:
    """It, or none."""
    return [ctypes.CDLL(None)] if platform.libc_ver()[0] == "glibc" else []


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, the learner's first."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]


def this_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
