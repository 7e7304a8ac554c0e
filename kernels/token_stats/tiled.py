"""Logits a tile at a time: matmul into a bounded workspace, row statistics over it, then the next tile.

Forward folds every tile into the rows' state. Backward goes over the vocabulary in the same tiles: it
computes the logits again (or reads them, where they were kept), turns them into the loss's gradient and
multiplies that by the head and by the hidden states. One slice of the head's gradient is complete after
one pass over the tokens, so no second [V, H] accumulator exists, and nothing is added atomically.

Both passes use the same tiles, so that probabilities and their normaliser come from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf.kernels.token_stats import rows
from rlhf.kernels.token_stats.rows import Scaling, Scratch, Tile, Upstream
from rlhf.kernels.token_stats.state import empty_state

CPU_TILE_BYTES = 2 << 20
CPU_WEIGHT_BYTES = 4 << 20
CPU_ROWS = 1024
GPU_ROWS = 32768
COLUMN_STEP = 256


@dataclass(frozen=True)
class Head:
    """One model's last hidden states `[n, H]` and its LM head `[V, H]`, `[V]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """The precision of logits, statistics and accumulated gradients."""
        return torch.float64 if self.hidden.dtype is torch.float64 else torch.float32

    @property
    def converts(self) -> bool:
        """Whether slices of the head are converted first: no 16-bit matmul with fp32 results here."""
        mixed = self.hidden.is_cuda and torch.version.hip is None
        return self.hidden.dtype is not self.wide and not mixed

    def converted(self) -> Head:
        """The same with hidden states in the precision that the matmuls take."""
        return replace(self, hidden=self.hidden.to(self.wide)) if self.converts else self

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        """The bias of a slice of the vocabulary."""
        return None if self.bias is None else self.bias[start:stop].to(self.wide)


@dataclass(frozen=True)
class Problem:
    """Everything the statistics of n tokens depend on; no token of it is masked."""

    policy: Head
    reference: Head | None
    targets: Tensor
    scaling: Scaling
    entropy: bool
    first_column: int
    workspace_bytes: int

    @property
    def vocabulary(self) -> int:
        """The number of columns of this rank's part of the vocabulary."""
        return self.policy.weight.shape[0]


@dataclass(frozen=True)
class Block:
    """Rows `[top, bottom)` of columns `[left, right)`."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left


@dataclass(frozen=True)
class Plan:
    """How the logits `[n, V]` are cut; the same for forward and backward, kept or not."""

    count: int
    vocabulary: int
    rows: int
    columns: int

    def slices(self) -> Iterator[tuple[int, int]]:
        """The slices of the vocabulary, in order."""
        for left in range(0, self.vocabulary, self.columns):
            yield left, min(left + self.columns, self.vocabulary)

    def blocks(self, left: int, right: int) -> Iterator[Block]:
        """The tiles of one slice, in order."""
        for top in range(0, self.count, self.rows):
            yield Block(top, min(top + self.rows, self.count), left, right)

    def stored(self, kept: Tensor, block: Block) -> Tensor:
        """Where the logits of a tile lie in the flat `[n * V]` buffer of kept ones."""
        height, width = block.shape
        start = self.count * block.left + block.top * width
        return kept[start : start + height * width].view(height, width)


@runtime_checkable
class RowKernels(Protocol):
    """The work on one tile that is not a matmul."""

    buffers: int
    """Tiles of workspace that a tile in flight takes, its own logits included."""

    def fold(self, state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
        """Fold the tile into its rows' state."""
        ...

    def gradient(
        self, tile: Tile, saved: Tensor, upstream: Upstream, *, scratch: Scratch, overwrite: bool
    ) -> Tensor:
        """The gradient by the tile's raw logits, in the precision the matmuls take.

        May use the bytes of the tile's logits where `overwrite`.
        """
        ...


class TorchRows:
    """Row kernels of plain PyTorch, on any device and in float64."""

    buffers = 4

    def fold(self, state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
        """Fold the tile into its rows' state."""
        rows.fold(state, tile, entropy=entropy, scratch=scratch)

    def gradient(
        self, tile: Tile, saved: Tensor, upstream: Upstream, *, scratch: Scratch, overwrite: bool
    ) -> Tensor:
        """The gradient by the tile's raw logits, in fp32 or float64."""
        return rows.gradient(tile, saved, upstream, scratch=scratch)


def plan(problem: Problem, kernels: RowKernels) -> Plan:
    """Tiles that keep matmuls busy, fit the workspace, and on a CPU stay in the cache."""
    count, vocabulary, size = len(problem.targets), problem.vocabulary, problem.policy.wide.itemsize
    heads = 1 if problem.reference is None else 2
    on_cpu = problem.targets.device.type == "cpu"
    tile_rows = max(1, min(count, CPU_ROWS if on_cpu else GPU_ROWS))
    budget = problem.workspace_bytes // (kernels.buffers * heads)
    if on_cpu:
        budget = min(budget, CPU_TILE_BYTES)
    columns = budget // (size * tile_rows)
    if problem.policy.converts:
        weight_bytes = CPU_WEIGHT_BYTES if on_cpu else problem.workspace_bytes // 4
        columns = min(columns, weight_bytes // (size * problem.policy.weight.shape[1]))
    columns = max(COLUMN_STEP, columns // COLUMN_STEP * COLUMN_STEP)
    return Plan(count, vocabulary, tile_rows, min(columns, max(1, vocabulary)))


def forward(problem: Problem, kernels: RowKernels, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The state `[STATE_ROWS, n]` of all rows, and the raw logits of policy and reference.

    The logits are flat `[n * V]` buffers in tile order where `keep`, else empty.
    """
    cut = plan(problem, kernels)
    policy, reference = problem.policy.converted(), _converted(problem.reference)
    wide, device = policy.wide, problem.targets.device
    state = empty_state(cut.count, dtype=wide, device=device)
    size = cut.count * cut.vocabulary if keep else 0
    kept = torch.empty(size, dtype=wide, device=device)
    ref_kept = torch.empty(size if reference is not None else 0, dtype=wide, device=device)
    scratch = Scratch(cut.rows * cut.columns, wide, device)
    for left, right in cut.slices():
        weights = _Slices(policy, reference, left, right)
        for block in cut.blocks(left, right):
            logits = cut.stored(kept, block) if keep else scratch("logits", *block.shape)
            _project(policy, weights.policy, block, out=logits)
            ref_logits = None
            if reference is not None and weights.reference is not None:
                stored = cut.stored(ref_kept, block) if keep else scratch("ref_logits", *block.shape)
                ref_logits = _project(reference, weights.reference, block, out=stored)
            tile = _tile(problem, block, logits, ref_logits)
            columns = state[:, block.top : block.bottom]
            kernels.fold(columns, tile, entropy=problem.entropy, scratch=scratch)
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
    group: str = "",
) -> Gradients:
    """The gradients, from `forward`'s finished rows `saved` and its kept logits (or empty tensors)."""
    cut = plan(problem, kernels)
    policy = problem.policy.converted()
    reference = _converted(problem.reference) if upstream.needs_reference else None
    scratch = Scratch(cut.rows * cut.columns, policy.wide, problem.targets.device)
    sums = _Sums(problem.policy, policy.hidden, needs)
    for left, right in cut.slices():
        weights = _Slices(policy, reference, left, right)
        for block in cut.blocks(left, right):
            keeps = kept[0].numel() > 0
            logits = cut.stored(kept[0], block) if keeps else scratch("logits", *block.shape)
            if not keeps:
                _project(policy, weights.policy, block, out=logits)
            ref_logits = None
            if reference is not None and weights.reference is not None:
                keeps_reference = kept[1].numel() > 0
                ref_logits = scratch("ref_logits", *block.shape)
                if keeps_reference:
                    ref_logits = cut.stored(kept[1], block)
                else:
                    _project(reference, weights.reference, block, out=ref_logits)
            tile = _tile(problem, block, logits, ref_logits)
            height = slice(block.top, block.bottom)
            gradient = kernels.gradient(
                tile,
                saved[:, height],
                upstream.rows(block.top, block.bottom),
                scratch=scratch,
                overwrite=not keeps,
            )
            sums.add(gradient, weights.policy, block)
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
    """The gradients as they add up over tiles: of the hidden states over slices, of the head over rows."""

    def __init__(self, policy: Head, hidden: Tensor, needs: Needs) -> None:
        self._policy, self._hidden, self._needs = policy, hidden, needs
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

    def add(self, gradient: Tensor, weight: Tensor, block: Block) -> None:
        """Add one tile's part."""
        height = slice(block.top, block.bottom)
        if self._d_hidden is not None:
            _add_product(self._d_hidden[height], gradient, weight)
        if self._d_weight is not None:
            hidden = self._hidden[height]
            if self._slice is None:
                self._slice = self._first(gradient, hidden, block)
            else:
                _add_product(self._slice, gradient.T, hidden)
        if self._d_bias is not None:
            self._d_bias[block.left : block.right] += gradient.sum(0, dtype=self._d_bias.dtype)

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
            self._d_weight[left:right] = self._slice
        self._slice = None

    def result(self) -> Gradients:
        """All sums, rounded once to the precision of what they are the gradient of."""
        d_hidden, d_bias, bias = self._d_hidden, self._d_bias, self._policy.bias
        return Gradients(
            None if d_hidden is None else d_hidden.to(self._policy.hidden.dtype),
            self._d_weight,
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )


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


def _weight_slice(head: Head, left: int, right: int) -> Tensor:
    part = head.weight[left:right]
    return part.to(head.hidden.dtype)


def _project(head: Head, weight: Tensor, block: Block, *, out: Tensor) -> Tensor:
    return _product(head.hidden[block.top : block.bottom], weight.T, out=out)


def _product(first: Tensor, second: Tensor, *, out: Tensor) -> Tensor:
    if first.dtype is out.dtype:
        return torch.mm(first, second, out=out)
    return torch.mm(first, second, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    if first.dtype is total.dtype:
        total.addmm_(first, second)
    else:
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)
