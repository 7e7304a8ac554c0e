"""Logits a tile at a time: matmul into a bounded workspace, row statistics over it, then the next tile.

Forward folds every tile into the rows' state. Backward goes over the vocabulary in the same tiles: it
computes the logits again (or reads them, where they were kept), turns them into the loss's gradient and
multiplies that by the head and by the hidden states. One slice of the head's gradient is complete after
one pass over the tokens, so no second [V, H] accumulator exists, and nothing is added atomically.

Both passes use the same tiles, so that probabilities and their normaliser come from the same numbers.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf.kernels.token_stats import rows
from rlhf.kernels.token_stats.gradients import Gradients, Needs, Sums, product
from rlhf.kernels.token_stats.rows import Coefficients, Scratch, Tile, Upstream, padded
from rlhf.kernels.token_stats.state import empty_state
from rlhf.kernels.token_stats.tile_sizes import Block, Head, Problem, plan


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
            height = slice(block.top, block.bottom)
            logits = cut.stored(kept, block) if keep else scratch("logits", *block.shape)
            product(policy.hidden[height], weights.policy.T, out=logits)
            ref_logits = None
            if reference is not None:
                ref_logits = cut.stored(ref_kept, block) if keep else scratch("ref_logits", *block.shape)
                product(reference.hidden[height], weights.reference.T, out=ref_logits)
            tile = _tile(problem, block, logits, ref_logits)
            kernels.fold(state[:, height], tile, entropy=problem.entropy, scratch=scratch)
    return state, kept, ref_kept


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
    sums = Sums(problem, cut, needs, group, factor)
    for left, right in cut.slices():
        weights = _Slices(policy, reference, left, right)
        for block in cut.blocks(left, right):
            height = slice(block.top, block.bottom)
            logits = cut.stored(kept[0], block) if kept[0].numel() else scratch("logits", *block.shape)
            if not kept[0].numel():
                product(policy.hidden[height], weights.policy.T, out=logits)
            ref_logits = None
            if reference is not None:
                ref_logits = (
                    cut.stored(kept[1], block) if kept[1].numel() else scratch("ref_logits", *block.shape)
                )
                if not kept[1].numel():
                    product(reference.hidden[height], weights.reference.T, out=ref_logits)
            tile = _tile(problem, block, logits, ref_logits)
            gradient = kernels.gradient(
                tile,
                coefficients.rows(block.top, block.bottom),
                scratch=scratch,
                dtype=sums.dtype,
                overwrite=not kept[0].numel(),
            )
            is_last = (block.bottom, block.right) == (cut.count, cut.vocabulary)
            sums.add(gradient, block, is_last=is_last)
        sums.store(left, right)
    return sums.result()


class _Slices:
    """A slice of each head as the logits' matmul takes it: converted when first asked for, once if shared."""

    def __init__(self, policy: Head, reference: Head | None, left: int, right: int) -> None:
        self._policy, self._reference, self._columns = policy, reference, slice(left, right)

    @cached_property
    def policy(self) -> Tensor:
        """The policy's."""
        return self._policy.weight[self._columns].to(self._policy.hidden.dtype)

    @cached_property
    def reference(self) -> Tensor:
        """The reference's."""
        assert self._reference is not None
        if self._reference.weight is self._policy.weight:
            return self.policy
        return self._reference.weight[self._columns].to(self._reference.hidden.dtype)


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


def _converted(head: Head | None) -> Head | None:
    return None if head is None else head.converted()
