"""Compiles Triton kernels for GPUs that this machine may lack, and reads the binary's use of resources."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhf.kernels.token_stats.triton_rows import launch_options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """Registers per thread, bytes spilled per thread, and 16-byte loads and stores in the program."""

    registers: int
    spilled: int
    wide_loads: int
    wide_stores: int


def resources(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], target: str, folder: Path
) -> Resources:
    """Compiles as the launcher would: pointers aligned to 16 bytes, strides and sizes of any value.

    `arguments` maps a name to its Triton type; `constants` are compile-time values.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else arguments[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if arguments.get(n, "").startswith("*")
        },
    )
    options = launch_options()
    if TARGETS[target].backend == "hip":
        options.pop("maxnreg", None)
        return _amd(triton.compile(source, target=TARGETS[target], options=options))
    return _nvidia(triton.compile(source, target=TARGETS[target], options=options), folder)


def _nvidia(made: Any, folder: Path) -> Resources:
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    text = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert usage is not None, text
    registers, stack, local = usage.groups()
    ptx = made.asm["ptx"]
    loads = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v8\.b32", ptx))
    stores = len(re.findall(r"st\.global[\w.:]*\.v4\.b32|st\.global[\w.:]*\.v8\.b32", ptx))
    return Resources(int(registers), int(stack) + int(local), loads, stores)


def _amd(made: Any) -> Resources:
    text = made.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    stores = len(re.findall(r"(?:global|buffer)_store_dwordx4", text))
    return Resources(number("vgpr_count"), spilled, loads, stores)
