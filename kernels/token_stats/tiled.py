"""Logits a tile at a time: matmul into a bounded workspace, row statistics over it, then the next tile.

Forward folds every tile into the rows' state. Backward goes over the vocabulary in the same tiles: it
computes the logits again (or reads them, where they were kept), turns them into the loss's gradient and
multiplies that by the head and by the hidden states. One slice of the head's gradient is complete after
one pass over the tokens, so no second [V, H] accumulator exists, and nothing is added atomically.

Both passes use the same tiles, so that probabilities and their normaliser come from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf.kernels.token_stats import rows
from rlhf.kernels.token_stats.parallel import SumOverRanks
from rlhf.kernels.token_stats.problem import Block, Head, Plan, Problem, plan
from rlhf.kernels.token_stats.rows import Coefficients, Scratch, Tile, Upstream, padded
from rlhf.kernels.token_stats.state import empty_state


COLLECTED_COLUMNS = 8192


@runtime_checkable
class RowKernels(Protocol):
    """The work on one tile that is not a matmul."""

    buffers: int
    """Tiles of workspace that a tile in flight takes, its own logits included."""

    def fold(self, state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
        """Fold the tile into its rows' state."""
        ...

    def gradient(
        self,
        tile: Tile,
        coefficients: Coefficients,
        *,
        scratch: Scratch,
        dtype: torch.dtype,
        overwrite: bool,
    ) -> Tensor:
        """The gradient by the tile's raw logits, in `dtype`, perhaps in the bytes of its logits."""
        ...


class TorchRows:
    """Row kernels of plain PyTorch, on any device and in float64."""

    buffers = 4

    def fold(self, state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
        """Fold the tile into its rows' state."""
        rows.fold(state, tile, entropy=entropy, scratch=scratch)

    def gradient(
        self,
        tile: Tile,
        coefficients: Coefficients,
        *,
        scratch: Scratch,
        dtype: torch.dtype,
        overwrite: bool,
    ) -> Tensor:
        """The gradient by the tile's raw logits, in `dtype`."""
        return rows.gradient(tile, coefficients, scratch=scratch).to(dtype)


def forward(problem: Problem, kernels: RowKernels, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The state `[STATE_ROWS, n]` of all rows, and the raw logits of policy and reference.

    The logits are flat `[n * padded(V)]` buffers in tile order where `keep`, else empty.
    """
    cut = plan(problem, kernels.buffers)
    policy, reference = problem.policy.converted(), _converted(problem.reference)
    wide, device = policy.wide, problem.targets.device
    state = empty_state(cut.count, dtype=wide, device=device)
    size = cut.count * padded(cut.vocabulary) if keep else 0
    kept = torch.empty(size, dtype=wide, device=device)
    ref_kept = torch.empty(size if reference is not None else 0, dtype=wide, device=device)
    scratch = Scratch(cut.rows * padded(cut.columns), wide, device)
    for left, right in cut.slices():
        weights = _Slices(policy, reference, left, right)
        for block in cut.blocks(left, right):
            logits = cut.stored(kept, block) if keep else scratch("logits", *block.shape)
            _project(policy, weights.policy, block, out=logits)
            ref_logits = None
            if reference is not None and weights.reference is not None:
                ref_logits = cut.stored(ref_kept, block) if keep else scratch("ref_logits", *block.shape)
                _project(reference, weights.reference, block, out=ref_logits)
            tile = _tile(problem, block, logits, ref_logits)
            part = state[:, block.top : block.bottom]
            kernels.fold(part, tile, entropy=problem.entropy, scratch=scratch)
    return state, kept, ref_kept


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Gradients:
    """By the policy's inputs, in their own precision; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def backward(
    problem: Problem,
    kernels: RowKernels,
    saved: Tensor,
    upstream: Upstream,
    kept: tuple[Tensor, Tensor],
    needs: Needs,
    group: str,
) -> Gradients:
    """The gradients, from `forward`'s finished rows `saved` and its kept logits (or empty tensors).

    With a `group` (by name, else empty) the one by the hidden states is summed over its ranks.
    """
    cut = plan(problem, kernels.buffers)
    policy = problem.policy.converted()
    reference = _converted(problem.reference) if upstream.needs_reference else None
    scratch = Scratch(cut.rows * padded(cut.columns), policy.wide, problem.targets.device)
    coefficients = rows.coefficients(saved, upstream)
    factor = None
    if problem.policy.hidden.dtype is torch.float16 and cut.count:
        coefficients, factor = rows.magnified(coefficients, upstream)
    sums = _Sums(problem.policy, needs, group, factor, columns=cut.columns)
    for left, right in cut.slices():
        weights = _Slices(policy, reference, left, right)
        for block in cut.blocks(left, right):
            logits = _stored_or_again(policy, weights.policy, cut, block, kept[0], scratch, "logits")
            ref_logits = None
            if reference is not None and weights.reference is not None:
                ref_logits = _stored_or_again(
                    reference, weights.reference, cut, block, kept[1], scratch, "ref_logits"
                )
            tile = _tile(problem, block, logits, ref_logits)
            gradient = kernels.gradient(
                tile,
                coefficients.rows(block.top, block.bottom),
                scratch=scratch,
                dtype=problem.policy.hidden.dtype,
                overwrite=not kept[0].numel(),
            )
            is_last = (block.bottom, block.right) == (cut.count, cut.vocabulary)
            sums.add(gradient, block, is_last=is_last)
        sums.store(left, right)
    return sums.result()


class _Slices:
    """A slice of each head, in the precision that the matmuls take; converted once where shared."""

    def __init__(self, policy: Head, reference: Head | None, left: int, right: int) -> None:
        self.policy = _weight_slice(policy, left, right)
        self.reference: Tensor | None = None
        if reference is not None:
            shared = reference.weight is policy.weight
            self.reference = self.policy if shared else _weight_slice(reference, left, right)


class _Sums:
    """The gradients as they add up over tiles: of the hidden states over slices, of the head over rows.

    The matmuls take the inputs in their own precision, as those of plain autograd do. Where such a product
    comes out rounded (16 bits on a CPU), columns are collected for few, long products by the head.
    """

    def __init__(
        self, policy: Head, needs: Needs, group: str, factor: Tensor | None, *, columns: int
    ) -> None:
        hidden = policy.hidden
        self._policy, self._hidden, self._group, self._factor = policy, hidden, group, factor
        self._d_hidden: Tensor | None = None
        self._d_weight: Tensor | None = None
        self._d_bias: Tensor | None = None
        if needs.hidden:
            self._d_hidden = torch.zeros(hidden.shape, dtype=policy.wide, device=hidden.device)
        if needs.weight:
            self._d_weight = torch.empty_like(policy.weight, memory_format=torch.contiguous_format)
        if needs.bias:
            assert policy.bias is not None
            self._d_bias = torch.zeros(policy.bias.shape, dtype=policy.wide, device=hidden.device)
        self._slice: Tensor | None = None
        self._sum: SumOverRanks | None = None
        self._collected: Tensor | None = None
        self._first_collected = 0
        if needs.hidden and _rounds(hidden, policy.wide):
            width = min(policy.weight.shape[0], max(COLLECTED_COLUMNS, columns))
            self._collected = hidden.new_empty(hidden.shape[0], width)

    def add(self, gradient: Tensor, block: Block, *, is_last: bool) -> None:
        """Add one tile's part; with the last one the sum over ranks begins, under what is left to do."""
        height = slice(block.top, block.bottom)
        if self._d_hidden is not None:
            if self._collected is not None:
                if block.right - self._first_collected > self._collected.shape[1]:
                    self._multiply_collected(block.left)
                start = block.left - self._first_collected
                self._collected[height, start : start + gradient.shape[1]] = gradient
                if is_last:
                    self._multiply_collected(block.right)
            else:
                weight = self._policy.weight[block.left : block.right].to(gradient.dtype)
                _add_product(self._d_hidden[height], gradient, weight)
            if is_last and self._group:
                self._sum = SumOverRanks(self._d_hidden, self._group)
        if self._d_weight is not None:
            hidden = self._hidden[height]
            if self._slice is None:
                self._slice = self._first(gradient, hidden, block)
            else:
                _add_product(self._slice, gradient.T, hidden)
        if self._d_bias is not None:
            self._d_bias[block.left : block.right] += gradient.sum(0, dtype=self._d_bias.dtype)

    def _multiply_collected(self, right: int) -> None:
        """Add the product of the columns collected so far, which end at `right`."""
        assert self._collected is not None and self._d_hidden is not None
        left, self._first_collected = self._first_collected, right
        weight = self._policy.weight[left:right].to(self._collected.dtype)
        _add_product(self._d_hidden, self._collected[:, : right - left], weight)

    def _first(self, gradient: Tensor, hidden: Tensor, block: Block) -> Tensor:
        assert self._d_weight is not None
        out = self._d_weight[block.left : block.right]
        if out.dtype is not self._policy.wide:
            out = torch.empty(out.shape, dtype=self._policy.wide, device=out.device)
        return _product(gradient.T, hidden, out=out)

    def store(self, left: int, right: int) -> None:
        """Write the head's gradient of a slice of which every row was added."""
        if self._d_weight is None:
            return
        if self._slice is None:
            self._d_weight[left:right] = 0
        elif self._slice.dtype is not self._d_weight.dtype:
            self._d_weight[left:right] = self._reduced(self._slice)
        self._slice = None

    def result(self) -> Gradients:
        """All sums, rounded once to the precision of what they are the gradient of."""
        if self._group and self._d_hidden is not None:
            # a rank without a single tile takes part in the sum all the same
            (self._sum or SumOverRanks(self._d_hidden, self._group)).wait()
        d_hidden, d_bias, bias = self._d_hidden, self._d_bias, self._policy.bias
        return Gradients(
            None if d_hidden is None else self._reduced(d_hidden).to(self._policy.hidden.dtype),
            self._d_weight,
            None if d_bias is None or bias is None else self._reduced(d_bias).to(bias.dtype),
        )

    def _reduced(self, wide: Tensor) -> Tensor:
        return wide if self._factor is None else wide / self._factor


def _tile(problem: Problem, block: Block, logits: Tensor, ref_logits: Tensor | None) -> Tile:
    reference = problem.reference
    return Tile(
        logits,
        problem.first_column + block.left,
        problem.targets[block.top : block.bottom],
        problem.scaling.rows(block.top, block.bottom),
        bias=problem.policy.bias_slice(block.left, block.right),
        ref_logits=ref_logits,
        ref_bias=None if reference is None else reference.bias_slice(block.left, block.right),
    )


def _stored_or_again(
    head: Head, weight: Tensor, cut: Plan, block: Block, kept: Tensor, scratch: Scratch, name: str
) -> Tensor:
    """A tile's raw logits: those kept in forward, or the same computed again."""
    if kept.numel():
        return cut.stored(kept, block)
    return _project(head, weight, block, out=scratch(name, *block.shape))


def _converted(head: Head | None) -> Head | None:
    return None if head is None else head.converted()


def _weight_slice(head: Head, left: int, right: int) -> Tensor:
    part = head.weight[left:right]
    return part.to(head.hidden.dtype)


def _project(head: Head, weight: Tensor, block: Block, *, out: Tensor) -> Tensor:
    return _product(head.hidden[block.top : block.bottom], weight.T, out=out)


def _rounds(factor: Tensor, wide: torch.dtype) -> bool:
    """Whether a product comes out in the precision of its factors, not in the wide one."""
    return factor.dtype is not wide and not (factor.is_cuda and torch.version.hip is None)


def _product(first: Tensor, second: Tensor, *, out: Tensor) -> Tensor:
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
