"""RMSNorm that keeps only its input for the backward pass, without float32 copies.

    y = w * x / sqrt(mean(x^2) + eps)        as Llama, Qwen, Mistral and others compute it

With u = x / rms and g = w * dy the gradients are dx = (g - u * mean(g * u)) / rms and dw = sum of dy * u, in
float32. Autograd alone would keep 6 more bytes per element of a 16-bit x, twice in every layer. The result y
is not kept by the layers that read it either: it is recomputed (recompute.py).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.layers.recompute import recomputable


def fuse_norms(model: nn.Module) -> int:
    """Replaces the forward of every RMSNorm of `model` by `rms_norm`; returns how many there are.

    A module is an RMSNorm if its forward takes one tensor, and gives the same bits on random inputs in
    float32 and in bfloat16.
    """
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    for norm in norms:
        cast(Any, norm).forward = partial(_forward, norm)
    return len(norms)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x `[..., H]` with weight `[H]`, both of one type; it can be differentiated once."""
    y, inverse = cast(Any, _RmsNorm).apply(x, weight, eps)
    return recomputable(y, _scaled, x, inverse, weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in plain operations."""
    wide = x.to(_wide(x))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, weight, eps = args
        inverse = torch.rsqrt(x.to(_wide(x)).pow(2).mean(-1, keepdim=True).add_(eps))  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, weight), inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        # in the letters above: unit = u, grad = dy and then g
        unit = x.to(inverse.dtype, copy=True).mul_(inverse)
        grad = grads[0].to(inverse.dtype, copy=True)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad.mul_(weight)
        mean = (grad * unit).mean(-1, keepdim=True)
        return grad.sub_(unit.mul_(mean)).mul_(inverse).to(x.dtype), d_weight, None


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """`weight * x * inverse`, rounded to the type of x before the weight, as transformers does."""
    return x.to(inverse.dtype, copy=True).mul_(inverse).to(x.dtype).mul_(weight)


def _wide(x: Tensor) -> torch.dtype:
    """The type to compute in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _forward(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Compares the module's forward, with random weights, with `rms_norm_reference`, bit for bit.

    The module's own weight is not used, so it may be on the meta device.
    """
    parameters = dict(module.named_parameters())
    eps = vars(module).get("variance_epsilon")
    if "Norm" not in type(module).__name__ or set(parameters) != {"weight"} or eps is None:
        return False
    size = parameters["weight"].shape
    # a norm of two tensors, such as one with a gate, computes something else with the second
    takes = list(inspect.signature(module.forward).parameters)
    if len(size) != 1 or "forward" in vars(module) or len(takes) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    numbers, weights = torch.randn(4, *size, generator=generator), torch.randn(size, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = numbers.to(dtype), weights.to(dtype)
        try:
            own = torch.func.functional_call(module, {"weight": weight}, (x,))
        except Exception:
            # the code of a model may fail in any way with such inputs: it is left as it is
            return False
        if not torch.equal(own, rms_norm_reference(x, weight, eps)):
            return False
    return True
