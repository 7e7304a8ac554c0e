"""RMSNorm that keeps its input for the backward pass, in 16 bits, and none of the float32 tensors in between.

    y = w * x / sqrt(mean(x^2) + eps)        as Llama, Qwen, Mistral and others compute it

With u = x / rms and g = w * dy the gradients are dx = (g - u * mean(g * u)) / rms and dw = sum of dy * u, in
float32. What autograd would keep of it is 6 more bytes a number, twice in every layer. The result is not kept
by those that read it either: it is computed again (recompute.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.layers.recompute import again


def fuse_norms(model: nn.Module) -> int:
    """Lets every norm of `model` that computes exactly this use it, and says how many do.

    Whether it does is tried on numbers, in float32 and bfloat16, bit for bit.
    """
    norms = [module for module in model.modules() if _is_one(module)]
    for norm in norms:
        cast(Any, norm).forward = partial(_forward, norm)
    return len(norms)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x[..., H]`, `weight[H]`, of one type; differentiable once."""
    y, inverse = cast(Any, _RmsNorm).apply(x, weight, eps)
    return again(y, _scaled, x, inverse, weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` means."""
    wide = x.to(_wide(x))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, weight, eps = args
        inverse = torch.rsqrt(x.to(_wide(x)).pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, weight), inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.to(inverse.dtype, copy=True).mul_(inverse)
        grad = grads[0].to(inverse.dtype, copy=True)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad.mul_(weight)
        share = (grad * unit).mean(-1, keepdim=True)
        return grad.sub_(unit.mul_(share)).mul_(inverse).to(x.dtype), d_weight, None


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return x.to(inverse.dtype, copy=True).mul_(inverse).to(x.dtype).mul_(weight)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _is_one(module: nn.Module) -> bool:
    """Its weight may be anywhere, on the meta device too: others are tried."""
    parameters = dict(module.named_parameters())
    eps = vars(module).get("variance_epsilon")
    if "Norm" not in type(module).__name__ or set(parameters) != {"weight"} or eps is None:
        return False
    size = parameters["weight"].shape
    if len(size) != 1 or "forward" in vars(module):
        return False
    generator = torch.Generator().manual_seed(0)
    numbers, weights = torch.randn(4, *size, generator=generator), torch.randn(size, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = numbers.to(dtype), weights.to(dtype)
        there = torch.func.functional_call(module, {"weight": weight}, (x,))
        if not torch.equal(there, rms_norm_reference(x, weight, eps)):
            return False
    return True
