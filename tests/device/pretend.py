"""A GPU that is none: `install` gives a torch without CUDA a device "cuda:0" in host memory (pretend.cpp).

What runs on it runs as on a GPU (`device.type`, `is_cuda`, backward passes in a thread of their own), and
what CUDA refuses is refused. Which tensors on the host an operator takes beside those of the device is
torch's own table: numbers (0 dimensions) where it checks no devices, and the indices of an indexing. Not
imitated: time, streams, Triton, kernels that are CUDA's alone but for the products of 16-bit numbers in
float32.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("pretend.cpp")
_torch: Any = torch
_library: Any = None


def install(folder: Path) -> None:
    """For the whole process and for good. Compiles in `folder`, about 15 s."""
    global _library
    built, at = folder / "pretend.so", Path(torch.__file__).parent
    libraries = (f"-L{at / 'lib'}", "-lc10", "-ltorch_cpu")
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-I{at / 'include'}", str(SOURCE)]
    subprocess.run([*command, "-o", str(built), *libraries], check=True)
    _torch.ops.load_library(str(built))
    _torch.ops.pretend.install(*operators())
    _library = _torch.library.Library("aten", "IMPL", "CUDA")
    _library.impl("mm.dtype_out", _product)
    _library.impl("addmm.dtype_out", _add_product)
    for name, function in FUNCTIONS.items():
        setattr(torch.cuda, name, function)
    _torch.UntypedStorage.clone = _cloned


def operators() -> tuple[list[str], list[str]]:
    """Those that take tensors of the host beside others, and those without a kernel for CUDA."""
    torchgen = importlib.util.find_spec("torchgen")
    assert torchgen is not None and torchgen.origin is not None
    table = Path(torchgen.origin).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    mixing, missing = list[str](), list[str]()
    for entry in re.split(r"^- func: ", table.read_text(), flags=re.M)[1:]:
        name, _, overload = entry[: entry.index("(")].partition(".")
        if "device_check: NoCheck" in entry:
            mixing.append(f"aten::{name}.{overload}")
        if "index" in name and "Tensor?[] indices" in entry:
            mixing.append(f"indices of aten::{name}")
        kernels = re.search(r"^  dispatch:\n((?:    .*\n?)+)", entry, flags=re.M)
        elsewhere = "structured_delegate" in entry or kernels is None
        if not elsewhere and kernels is not None and not re.search("CUDA|Composite", kernels[1]):
            missing.append(f"aten::{name}.{overload}")
    return mixing, missing


def _product(first: Tensor, second: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert first.dtype == second.dtype and first.dtype.itemsize == 2 and out.dtype == dtype == torch.float32
    return out.copy_(first.float() @ second.float())


def _add_product(total: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert first.dtype == second.dtype and first.dtype.itemsize == 2 and out.dtype == dtype == torch.float32
    return out.copy_(total + first.float() @ second.float())


_clone = _torch.UntypedStorage.clone


def _cloned(storage: Any) -> Any:
    if storage.device.type != "cuda":
        return _clone(storage)
    there = {"dtype": torch.uint8, "device": storage.device}
    return torch.empty(0, **there).set_(storage).clone().untyped_storage()


def nothing(*_: Any) -> None:
    """What a call does to a device that is not there."""


FUNCTIONS: dict[str, Any] = {
    "_lazy_init": nothing,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": nothing,
    "synchronize": nothing,
    "empty_cache": nothing,
    "manual_seed_all": nothing,
    "max_memory_allocated": lambda device=None: 0,
    "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
    "get_device_name": lambda device=None: "none",
    # of one that no flash attention serves
    "get_device_capability": lambda device=None: (7, 5),
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": nothing,
    "device_of": lambda tensor: nullcontext(),
}
