"""Gated MLPs that keep only their two projections for the backward pass and recompute what follows from them.

    y = down(act(gate(x)) * up(x))        as Llama, Qwen, Mistral, Gemma and others compute it

act(gate) and the product are computed again in the backward pass (recompute.py). These are 2 of the 4 tensors
`[T, I]` that autograd would keep (I: intermediate size), a quarter of a layer's activations.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.layers.recompute import recomputable
from rlhf.torch_typed import seeded

_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


def lighten_mlps(model: nn.Module) -> int:
    """Replaces the forward of every gated MLP of `model` by one that keeps less; returns how many there are.

    An MLP is a gated MLP if its own forward gives the same bits as this one on a random input.
    """
    mlps = [module for module in model.modules() if _is_gated_mlp(module)]
    for mlp in mlps:
        cast(Any, mlp).forward = partial(_forward, mlp)
    return len(mlps)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    act = recomputable(mlp.act_fn(gate), mlp.act_fn, gate)
    return mlp.down_proj(recomputable(act * up, torch.mul, act, up))


@torch.no_grad()
def _is_gated_mlp(module: nn.Module) -> bool:
    """Compares a copy of `module` that has small random projections with `_forward`, bit for bit.

    The module's own weights are not used, so they may be on the meta device.
    """
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    act = children.get("act_fn", vars(module).get("act_fn"))
    # an activation with weights would not be `act(gate)` alone
    has_weights = isinstance(act, nn.Module) and any(True for _ in act.parameters())
    if set(linears) != _PROJECTIONS or not callable(act) or has_weights or "forward" in vars(module):
        return False
    small: Any = copy.copy(module)
    small._modules = dict(children)
    hidden, intermediate = linears["gate_proj"].in_features, 8
    with seeded(0):
        small.gate_proj, small.up_proj = nn.Linear(hidden, intermediate), nn.Linear(hidden, intermediate)
        small.down_proj = nn.Linear(intermediate, hidden)
        x = torch.randn(1, 3, hidden)
    try:
        return torch.equal(small(x), _forward(small, x))
    except Exception:
        # the code of a model may fail in any way with such weights and inputs: it is left as it is
        return False
