"""What is computed, and how the logits `[n, V]` are cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.kernels.token_stats.rows import Scaling, padded

CPU_TILE_BYTES = 4 << 20
CPU_WEIGHT_BYTES = 2 << 20
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
        """Where the logits of a tile lie in the flat buffer of kept ones, `[n * padded(V)]`."""
        height, width = block.shape
        length = padded(width)
        start = self.count * block.left + block.top * length
        return kept[start : start + height * length].view(height, length)[:, :width]


def plan(problem: Problem, buffers: int) -> Plan:
    """Tiles that keep matmuls busy, fit the workspace, and on a CPU stay in the cache.

    `buffers` is how many tiles of workspace a tile in flight takes.
    """
    count, vocabulary, size = len(problem.targets), problem.vocabulary, problem.policy.wide.itemsize
    heads = 1 if problem.reference is None else 2
    on_cpu = problem.targets.device.type == "cpu"
    tile_rows = max(1, min(count, CPU_ROWS if on_cpu else GPU_ROWS))
    budget = problem.workspace_bytes // (buffers * heads)
    if on_cpu:
        budget = min(budget, CPU_TILE_BYTES)
    columns = budget // (size * tile_rows)
    if problem.policy.converts:
        weight_bytes = CPU_WEIGHT_BYTES if on_cpu else problem.workspace_bytes // 4
        columns = min(columns, weight_bytes // (size * problem.policy.weight.shape[1]))
    columns = max(COLUMN_STEP, columns // COLUMN_STEP * COLUMN_STEP)
    return Plan(count, vocabulary, tile_rows, min(columns, max(1, vocabulary)))
