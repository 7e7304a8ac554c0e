"""Memory of this machine, and its measured speed in a matrix product and in a copy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """What one rank can use."""

    device: str
    memory: int
    """Bytes of memory: of the GPU, or this rank's share of the host."""
    flops: float
    """Floating-point operations a second in a large matrix product of the model's dtype."""
    bandwidth: float
    """Bytes a second, read and written together, in a copy."""
    taken: int = 0
    """Bytes already in use: by this process on a CPU, by all processes on a GPU."""

    @property
    def on_cpu(self) -> bool:
        return self.device.startswith("CPU")

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, *, ranks_here: int) -> Machine:
        """Measures this machine, which takes about half a second on a CPU.

        `ranks_here`: the ranks on this host, which share its memory.
        """
        if device.type == "cuda":
            cuda: Any = torch.cuda
            name: str = cuda.get_device_name(device)
            free, memory = cast(tuple[int, int], cuda.mem_get_info(device))
            taken = memory - free
        else:
            name, memory = f"CPU, {torch.get_num_threads()} thread(s)", host_memory() // ranks_here
            taken = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        size = 4096 if device.type == "cuda" else 512
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        flops = 2 * size**3 / _seconds(lambda: a @ b, device)
        source = torch.ones(64 << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
        return cls(name, memory, flops, bandwidth, taken)


def host_memory() -> int:
    """Bytes of memory of this machine, or of its container's limit if that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(name)
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of five calls of `work`, after one that is not counted."""
    times: list[float] = []
    for _ in range(6):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])
