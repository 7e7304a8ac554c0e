"""Chooses the implementation of a kernel (reference, tiled or Triton) for the tensors of a call."""

from __future__ import annotations

import importlib.util
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

Backend: TypeAlias = Literal["auto", "reference", "tiled", "triton"]
Resolved: TypeAlias = Literal["reference", "tiled", "triton"]


def resolve(backend: str, tensor: Tensor, *, offered: tuple[str, ...]) -> Resolved:
    """The implementation that runs for `backend` on `tensor`'s device and dtype.

    `offered` are the implementations that the kernel has. `auto` is Triton for CUDA tensors where Triton can
    run, otherwise plain PyTorch: `tiled` where it is offered, else `reference`.

    Raises ValueError if the name is unknown or that backend cannot run here; the message says why.
    """
    if backend not in get_args(Backend) or backend not in ("auto", *offered):
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(('auto', *offered))}")
    if backend == "auto":
        on_gpu = tensor.is_cuda and "triton" in offered and why_not_triton(tensor) is None
        plain = "tiled" if "tiled" in offered else "reference"
        return "triton" if on_gpu else plain
    if backend == "triton":
        reason = why_not_triton(tensor)
        if reason is not None:
            raise ValueError(f"backend 'triton' {reason}; use {' or '.join(repr(o) for o in offered[:-1])}")
    return cast(Resolved, backend)


def why_not_triton(tensor: Tensor) -> str | None:
    """The reason why Triton cannot run on this tensor, or None if it can."""
    if tensor.dtype is torch.float64:
        return "keeps fp32 statistics and would lose the precision of float64 inputs"
    if importlib.util.find_spec("triton") is None:
        return "needs the package 'triton', which is not installed"
    if not tensor.is_cuda and not interpreting():
        return f"needs CUDA tensors, got one on {tensor.device} (TRITON_INTERPRET=1 was not set at import)"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    from triton import knobs  # pyright: ignore[reportMissingTypeStubs]

    return bool(knobs.runtime.interpret)
