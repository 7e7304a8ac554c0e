"""Gated MLPs that keep their two projections for the backward pass, and nothing that is made of them.

    y = down(act(gate(x)) * up(x))        as Llama, Qwen, Mistral, Gemma and others compute it

act(gate) and the product are computed again there (recompute.py): 2 of the 4 tensors `[T, I]` that autograd
keeps of it, a quarter of a layer's activations.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.layers.recompute import again
from rlhf.torch_typed import seeded

_PARTS = {"gate_proj", "up_proj", "down_proj"}


def lighten_mlps(model: nn.Module) -> int:
    """Lets every MLP of `model` that computes exactly this keep less, and says how many do.

    Whether it does is tried on numbers, bit for bit, with small projections in place of its own.
    """
    mlps = [module for module in model.modules() if _is_one(module)]
    for mlp in mlps:
        cast(Any, mlp).forward = partial(_forward, mlp)
    return len(mlps)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    act = again(mlp.act_fn(gate), mlp.act_fn, gate)
    return mlp.down_proj(again(act * up, torch.mul, act, up))


@torch.no_grad()
def _is_one(module: nn.Module) -> bool:
    """Its weights may be anywhere, on the meta device too: others are tried."""
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    act = children.get("act_fn", vars(module).get("act_fn"))
    plain = not isinstance(act, nn.Module) or not any(True for _ in act.parameters())
    if set(linears) != _PARTS or not callable(act) or not plain or "forward" in vars(module):
        return False
    small: Any = copy.copy(module)
    small._modules = dict(children)
    wide, narrow = linears["gate_proj"].in_features, 8
    with seeded(0):
        small.gate_proj, small.up_proj = nn.Linear(wide, narrow), nn.Linear(wide, narrow)
        small.down_proj = nn.Linear(narrow, wide)
        x = torch.randn(1, 3, wide)
    return torch.equal(small(x), _forward(small, x))
