"""The highest speed of this machine in matrix products and in copies; other benchmarks report shares of it.

Random data (zeros run faster on some GPUs), the same buffers each time, medians of interleaved repeats.

Run: `python -m benchmarks.ceilings --out FILE.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

# the side of the square matrices, and the bytes of the buffer that is copied
SIZES = {"cuda": (8192, 4 << 30), "cpu": (1024, 256 << 20)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def ceilings(device: str, repeats: int) -> dict[str, Any]:
    side, size = SIZES[device]
    work: dict[str, tuple[Callable[[], Any], float]] = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        work[f"matmul_{name}_tflops"] = product, 2 * side**3 / 1e12
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    # each byte is read and written
    work["copy_gb_per_second"] = partial(target.copy_, source), 2 * size / 1e9
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 2):
        for name, (call, _) in work.items():
            taken = seconds(call, device)
            if repeat >= 2:
                times[name].append(taken)
    figures = {name: round(work[name][1] / statistics.median(t), 3) for name, t in times.items()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "side": side,
        "copied_bytes": size,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The most that this machine does.")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = ceilings("cuda" if torch.cuda.is_available() else "cpu", options.repeats)
    print(json.dumps(found, indent=1))  # noqa: T201
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
