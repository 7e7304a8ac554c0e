"""Speeds up bfloat16 linear layers on a CPU: keeps their weights packed in oneDNN's blocked layout.

Without it a product with few rows, as in decoding, spends much of its time on packing the whole weight again
for every token. The cost is one more copy of these weights while the engine holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

_ROWS = 64
"""Number of rows given to oneDNN as a hint; the packed weight works for any number."""


class PackedLinears:
    """Packed copies of a model's linear layers, made at first use and again for each weight that changed."""

    def __init__(self, model: nn.Module) -> None:
        # subclasses, and layers with a replaced forward, may do more than a matrix product
        linears = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        self._linears = [linear for linear in linears if can_pack(linear.weight)]
        self._forwards: dict[nn.Linear, tuple[tuple[int, int], Callable[[Tensor], Tensor]]] = {}

    @contextmanager
    def installed(self) -> Generator[None]:
        """Within the context the layers compute with their packed weights."""
        forwards = [self._forward(linear) for linear in self._linears]
        for linear, forward in zip(self._linears, forwards, strict=True):
            cast(Any, linear).forward = forward
        try:
            yield
        finally:
            for linear in self._linears:
                del linear.forward

    def clear(self) -> None:
        """Frees the packed weights."""
        self._forwards.clear()

    def _forward(self, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        state = linear.weight.data_ptr(), linear.weight._version
        if linear not in self._forwards or self._forwards[linear][0] != state:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
            self._forwards[linear] = state, partial(_product, packed, linear)
        return self._forwards[linear][1]


def _product(packed: Tensor, linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, linear.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether this is a plain bfloat16 parameter on a CPU for which oneDNN has bfloat16 products."""
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
