"""Activation checkpointing: each layer of a model runs its forward again in the backward pass.

The model stays in evaluation mode. transformers' own checkpointing needs training mode, which switches on all
that a model does at random in training (dropout called as a function, noise on a router's input), and then
two passes over the same tokens differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.models.weight_files import ModelError


def checkpoint_layers(model: nn.Module) -> int:
    """Makes every layer of `model` keep its inputs alone for the backward pass; returns how many there are.

    Layers are those that transformers can checkpoint; one inside another is part of that one. Raises
    ModelError: there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    outer = [layer for layer in layers if id(layer) not in inner]
    if not outer:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be checkpointed: set "
            "model.gradient_checkpointing=false"
        )
    for layer in outer:
        cast(Any, layer).forward = partial(_forward, layer.forward)
    return len(outer)


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # in evaluation mode no layer draws random numbers
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    return cast(Any, checkpoint)(forward, *args, **settings, **kwargs)
