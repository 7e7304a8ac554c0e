"""Calls of torch whose own annotations are incomplete, each with the types it is used with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as _untyped_adamw

_torch: Any = torch
_adamw: Any = _untyped_adamw


def integers(tensor: Tensor) -> list[int]:
    """The elements of an integer tensor `[n]`, on the host."""
    return _torch.Tensor.tolist(tensor)


def numbers(tensor: Tensor) -> list[float]:
    """The elements of a tensor of any floating type `[n]`, on the host."""
    return _torch.Tensor.tolist(tensor)


def pieces(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Consecutive parts of a tensor's first axis."""
    return list(_torch.Tensor.split(tensor, list(sizes)))


def unflatten(tensor: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """One axis as several; a size of -1 is what is left over."""
    return _torch.Tensor.unflatten(tensor, axis, tuple(sizes))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, whatever their types, in a few kernels for all of them."""
    _torch._foreach_copy_(list(targets), list(sources))


def norm(tensor: Tensor) -> Tensor:
    """The root of the sum of squares, in float32 at least."""
    return _torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    updates: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One fused update of `weight` and its moments, in place, after `updates` others (left as it is)."""
    _adamw(
        [weight],
        [gradient],
        [first],
        [second],
        [],
        [updates.clone()],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
    )


def after_gradient(weight: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Has `hook(weight)` called whenever a backward pass has added to `weight.grad`."""
    _torch.Tensor.register_post_accumulate_grad_hook(weight, hook)


def run_numbers(tensor: Tensor) -> Tensor:
    """Numbers the runs of equal elements: `7 7 3 3 3 9` -> `0 0 1 1 1 2`."""
    return _torch.unique_consecutive(tensor, return_inverse=True)[1]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module below a model, and the model itself, by its path."""
    return dict(_torch.nn.Module.named_modules(model))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Generator[None]:
    """The host's generator, and that of a GPU if it is given, starts from `seed` in here.

    Afterwards it goes on as if nothing had been drawn.
    """
    with _torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        _torch.manual_seed(seed)
        yield
