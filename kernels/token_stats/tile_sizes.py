"""How the logits `[n, V]` are cut into tiles that fit cache and workspace; the inputs they are made from."""

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
    """One model's last hidden states `[n, H]` and its LM head: weight `[V, H]` and bias `[V]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """The precision of logits, statistics and accumulated gradients."""
        return torch.float64 if self.hidden.dtype is torch.float64 else torch.float32

    @property
    def converts(self) -> bool:
        """Whether inputs are converted first, since this device has no 16-bit matmul with fp32 results."""
        mixed = self.hidden.is_cuda and torch.version.hip is None
        return self.hidden.dtype is not self.wide and not mixed

    def converted(self) -> Head:
        """The same head with hidden states in the precision that the matmuls take."""
        return replace(self, hidden=self.hidden.to(self.wide)) if self.converts else self

    def bias_slice(self, start: int, stop: int) -> Tensor | None:
        """The bias of a slice of the vocabulary."""
        return None if self.bias is None else self.bias[start:stop].to(self.wide)


@dataclass(frozen=True)
class StatsInputs:
    """Everything that the statistics of n unmasked tokens depend on, and the workspace for it."""

    policy: Head
    reference: Head | None
    targets: Tensor
    scaling: Scaling
    entropy: bool
    first_column: int
    workspace_bytes: int

    @property
    def vocabulary(self) -> int:
        """The number of columns of this rank's shard of the vocabulary."""
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
    """The tile sizes for logits `[n, V]`: the same in forward and backward, with logits kept or not."""

    count: int
    vocabulary: int
    rows: int
    columns: int

    def slices(self) -> Iterator[tuple[int, int]]:
        """The slices `(left, right)` of the vocabulary, in order."""
        for left in range(0, self.vocabulary, self.columns):
            yield left, min(left + self.columns, self.vocabulary)

    def blocks(self, left: int, right: int) -> Iterator[Block]:
        """The tiles of one slice, in order."""
        for top in range(0, self.count, self.rows):
            yield Block(top, min(top + self.rows, self.count), left, right)

    def stored(self, kept: Tensor, block: Block) -> Tensor:
        """The view of a tile's logits in the flat buffer of kept logits, `[n * padded(V)]`."""
        height, width = block.shape
        length = padded(width)
        start = self.count * block.left + block.top * length
        return kept[start : start + height * length].view(height, length)[:, :width]


def plan(inputs: StatsInputs, buffers: int) -> Plan:
    """Tile sizes that fit the workspace, are large enough for fast matmuls, and on a CPU stay in the cache.

    `buffers` is the number of tile-sized buffers that the row kernels need at once.
    """
    count, vocabulary, size = len(inputs.targets), inputs.vocabulary, inputs.policy.wide.itemsize
    heads = 1 if inputs.reference is None else 2
    on_cpu = inputs.targets.device.type == "cpu"
    tile_rows = max(1, min(count, CPU_ROWS if on_cpu else GPU_ROWS))
    budget = inputs.workspace_bytes // (buffers * heads)
    if on_cpu:
        budget = min(budget, CPU_TILE_BYTES)
    columns = budget // (size * tile_rows)
    if inputs.policy.converts:
        weight_bytes = CPU_WEIGHT_BYTES if on_cpu else inputs.workspace_bytes // 4
        columns = min(columns, weight_bytes // (size * inputs.policy.weight.shape[1]))
    columns = max(COLUMN_STEP, columns // COLUMN_STEP * COLUMN_STEP)
    return Plan(count, vocabulary, tile_rows, min(columns, max(1, vocabulary)))
