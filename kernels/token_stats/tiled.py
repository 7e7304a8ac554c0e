"""Forward and backward over the logits, one tile at a time, in a bounded workspace.

Forward computes each tile of logits by a matmul and folds it into the rows' state. Backward goes over the
same tiles: it computes the logits again (or reads them, if they were kept), turns them into the loss's
gradient and multiplies that by the head and by the hidden states. A slice of the head's gradient is
complete after one pass over the tokens, so no second [V, H] accumulator and no atomic addition is needed.

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
from rlhf.kernels.token_stats.tile_sizes import Block, Head, StatsInputs, plan


@runtime_checkable
class RowKernels(Protocol):
    """The part of the work on a tile that is not a matmul."""

    buffers: int
    """The number of tile-sized buffers needed at once, the tile's own logits included."""

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
        """The gradient by the tile's raw logits, in `dtype`.

        With `overwrite` it may be written over the logits.
        """
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


def forward(inputs: StatsInputs, kernels: RowKernels, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The state `[STATE_ROWS, n]` of all rows, and the raw logits of policy and reference model.

    With `keep` the logits are flat `[n * padded(V)]` buffers in the order of tiles, otherwise empty.
    """
    cut = plan(inputs, kernels.buffers)
    policy, reference = inputs.policy.converted(), _converted(inputs.reference)
    wide, device = policy.wide, inputs.targets.device
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
            tile = _tile(inputs, block, logits, ref_logits)
            kernels.fold(state[:, height], tile, entropy=inputs.entropy, scratch=scratch)
    return state, kept, ref_kept


def backward(
    inputs: StatsInputs,
    kernels: RowKernels,
    saved: Tensor,
    upstream: Upstream,
    kept: tuple[Tensor, Tensor],
    needs: Needs,
    group: str,
) -> Gradients:
    """The gradients by the policy's inputs.

    `saved` are the finished rows `[SAVED_ROWS, n]`, `kept` the logits that `forward` kept (or empty tensors).
    With a `group` (its name, else empty) the gradient by the hidden states is summed over its ranks.
    """
    cut = plan(inputs, kernels.buffers)
    policy = inputs.policy.converted()
    reference = _converted(inputs.reference) if upstream.needs_reference else None
    scratch = Scratch(cut.rows * padded(cut.columns), policy.wide, inputs.targets.device)
    coefficients = rows.coefficients(saved, upstream)
    factor = None
    if inputs.policy.hidden.dtype is torch.float16 and cut.count:
        coefficients, factor = rows.magnified(coefficients, upstream)
    sums = Sums(inputs, cut, needs, group, factor)
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
            tile = _tile(inputs, block, logits, ref_logits)
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
    """A slice of both models' heads in the dtype of the matmul, converted at first use, once if shared."""

    def __init__(self, policy: Head, reference: Head | None, left: int, right: int) -> None:
        self._policy, self._reference, self._columns = policy, reference, slice(left, right)

    @cached_property
    def policy(self) -> Tensor:
        """Slice of the policy's head."""
        return self._policy.weight[self._columns].to(self._policy.hidden.dtype)

    @cached_property
    def reference(self) -> Tensor:
        """Slice of the reference model's head."""
        assert self._reference is not None
        if self._reference.weight is self._policy.weight:
            return self.policy
        return self._reference.weight[self._columns].to(self._reference.hidden.dtype)


def _tile(inputs: StatsInputs, block: Block, logits: Tensor, ref_logits: Tensor | None) -> Tile:
    reference = inputs.reference
    return Tile(
        logits,
        inputs.first_column + block.left,
        inputs.targets[block.top : block.bottom],
        inputs.scaling.rows(block.top, block.bottom),
        bias=inputs.policy.bias_slice(block.left, block.right),
        ref_logits=ref_logits,
        ref_bias=None if reference is None else reference.bias_slice(block.left, block.right),
    )


def _converted(head: Head | None) -> Head | None:
    return None if head is None else head.converted()
