"""Gradients by hidden states, head and bias, accumulated over tiles, and the matmuls that make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.kernels.token_stats.parallel import SumOverRanks
from rlhf.kernels.token_stats.tile_sizes import Block, Head, Plan, StatsInputs

COLLECTED_COLUMNS = 8192
"""Most columns of logit gradients that are collected for one matmul, where its result is rounded."""


@dataclass(frozen=True)
class Needs:
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Gradients:
    """Gradients by the policy's inputs, each in the precision of its input; None where none is needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sums:
    """Accumulates the gradients tile by tile: by the hidden states over columns, by the head over rows.

    The matmuls take the inputs in their own precision, as those of plain autograd do, or in fp32 on a CPU
    without fast matmuls in that precision. Where the result of a matmul is rounded to 16 bits (bf16 on a
    CPU), the columns of several tiles are collected first, so that fewer rounded products are added up.
    """

    def __init__(
        self, inputs: StatsInputs, cut: Plan, needs: Needs, group: str, factor: Tensor | None
    ) -> None:
        policy = inputs.policy
        self.dtype = _matmul_dtype(policy)
        """The dtype in which `add` takes the gradient by a tile's logits."""
        self._policy, self._group, self._factor = policy, group, factor
        self._hidden = policy.hidden.to(self.dtype)
        device = policy.hidden.device
        self._d_hidden: Tensor | None = None
        self._d_weight: Tensor | None = None
        self._d_bias: Tensor | None = None
        if needs.hidden:
            self._d_hidden = torch.zeros(policy.hidden.shape, dtype=policy.wide, device=device)
        if needs.weight:
            self._d_weight = torch.empty_like(policy.weight, memory_format=torch.contiguous_format)
        if needs.bias:
            assert policy.bias is not None
            self._d_bias = torch.zeros(policy.bias.shape, dtype=policy.wide, device=device)
        self._slice: Tensor | None = None
        self._sum: SumOverRanks | None = None
        self._collected: Tensor | None = None
        self._first_collected = 0
        if needs.hidden and _rounds(self._hidden, policy.wide):
            affordable = inputs.workspace_bytes // (2 * max(1, cut.count))
            width = max(cut.columns, min(COLLECTED_COLUMNS, affordable, cut.vocabulary))
            self._collected = self._hidden.new_empty(cut.count, width)

    def add(self, gradient: Tensor, block: Block, *, is_last: bool) -> None:
        """Adds the contribution of one tile; the last one starts the asynchronous sum over ranks."""
        height = slice(block.top, block.bottom)
        if self._d_hidden is not None:
            if self._collected is None:
                weight = self._policy.weight[block.left : block.right].to(self.dtype)
                _add_product(self._d_hidden[height], gradient, weight)
            else:
                self._collect(gradient, block, self._collected, is_last=is_last)
            if is_last and self._group:
                self._sum = SumOverRanks(self._d_hidden, self._group)
        if self._d_weight is not None:
            hidden = self._hidden[height]
            if self._slice is None:
                self._slice = self._first(gradient, hidden, self._d_weight[block.left : block.right])
            else:
                _add_product(self._slice, gradient.T, hidden)
        if self._d_bias is not None:
            self._d_bias[block.left : block.right] += gradient.sum(0, dtype=self._d_bias.dtype)

    def _collect(self, gradient: Tensor, block: Block, collected: Tensor, *, is_last: bool) -> None:
        if block.right - self._first_collected > collected.shape[1]:
            self._multiply(collected, block.left)
        start, stop = block.left - self._first_collected, block.right - self._first_collected
        collected[block.top : block.bottom, start:stop] = gradient
        if is_last:
            self._multiply(collected, block.right)

    def _multiply(self, collected: Tensor, right: int) -> None:
        """Multiplies the columns collected so far, which end at `right`, by the head and adds the product."""
        assert self._d_hidden is not None
        left, self._first_collected = self._first_collected, right
        weight = self._policy.weight[left:right].to(self.dtype)
        _add_product(self._d_hidden, collected[:, : right - left], weight)

    def _first(self, gradient: Tensor, hidden: Tensor, out: Tensor) -> Tensor:
        if out.dtype is not self._policy.wide:
            out = torch.empty(out.shape, dtype=self._policy.wide, device=out.device)
        return product(gradient.T, hidden, out=out)

    def store(self, left: int, right: int) -> None:
        """Writes the head's gradient of a slice of the vocabulary once the tiles of all rows were added."""
        if self._d_weight is None:
            return
        if self._slice is None:
            self._d_weight[left:right] = 0
        elif self._slice.dtype is not self._d_weight.dtype:
            self._d_weight[left:right] = self._reduced(self._slice)
        self._slice = None

    def result(self) -> Gradients:
        """The accumulated gradients, each in the precision of its input."""
        if self._group and self._d_hidden is not None:
            # a rank without tiles must take part in the collective too
            (self._sum or SumOverRanks(self._d_hidden, self._group)).wait()
        d_hidden, d_bias, bias = self._d_hidden, self._d_bias, self._policy.bias
        return Gradients(
            None if d_hidden is None else self._reduced(d_hidden).to(self._policy.hidden.dtype),
            self._d_weight,
            None if d_bias is None or bias is None else self._reduced(d_bias).to(bias.dtype),
        )

    def _reduced(self, wide: Tensor) -> Tensor:
        return wide if self._factor is None else wide / self._factor


def product(first: Tensor, second: Tensor, *, out: Tensor) -> Tensor:
    """Writes the matrix product into `out`, whose dtype may be wider than that of the factors."""
    if first.dtype is out.dtype:
        return torch.mm(first, second, out=out)
    if _rounds(first, out.dtype):
        return out.copy_(torch.mm(first, second))
    return torch.mm(first, second, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    if first.dtype is total.dtype:
        total.addmm_(first, second)
    elif _rounds(first, total.dtype):
        total.add_(torch.mm(first, second))
    else:
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)


def _rounds(factor: Tensor, wide: torch.dtype) -> bool:
    """Whether matmuls round the result to the factors' 16 bits, since they cannot return the wide dtype."""
    return factor.dtype is not wide and not (factor.is_cuda and torch.version.hip is None)


def _matmul_dtype(policy: Head) -> torch.dtype:
    """The inputs' own precision, or the wide one on a CPU that has no fast matmuls in 16 bits."""
    dtype = policy.hidden.dtype
    if policy.hidden.device.type != "cpu" or dtype is policy.wide:
        return dtype
    has_fast = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, has_fast[dtype])():
        return dtype
    return policy.wide
