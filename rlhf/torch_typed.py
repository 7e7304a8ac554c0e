"""Typed wrappers of torch functions whose own annotations are incomplete."""

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
    """Splits a tensor along its first axis into consecutive parts of the given sizes."""
    return list(_torch.Tensor.split(tensor, list(sizes)))


def unflatten(tensor: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """Splits one axis into several of the given sizes; one of them may be -1 and is then inferred."""
    return _torch.Tensor.unflatten(tensor, axis, tuple(sizes))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, converting types, in a few kernels for all of them."""
    _torch._foreach_copy_(list(targets), list(sources))


def norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm of all elements, computed in float32 (in float64 for float64)."""
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
    """One fused AdamW update of `weight` and its moments `first` and `second`, in place.

    `updates`: how many updates came before; the tensor itself is not changed.
    """
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
    """Registers `hook(weight)`, to be called whenever a backward pass has added to `weight.grad`."""
    _torch.Tensor.register_post_accumulate_grad_hook(weight, hook)


def run_numbers(tensor: Tensor) -> Tensor:
    """Numbers the runs of equal elements: `7 7 3 3 3 9` -> `0 0 1 1 1 2`."""
    return _torch.unique_consecutive(tensor, return_inverse=True)[1]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by their paths, the model itself (path "") included."""
    return dict(_torch.nn.Module.named_modules(model))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Generator[None]:
    """Within this context, the host's random generator starts from `seed`, and so does that of a given GPU.

    Afterwards they continue as if nothing had been drawn.
    """
    with _torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        _torch.manual_seed(seed)
        yield
