"""Vocabulary parallelism: merges the row states of all ranks, and sums the gradient by hidden states.

Each rank folds its own columns of the vocabulary, then one all-gather exchanges the states. Every rank
merges them in rank order, so all get the same bits. Backward needs one sum over ranks, of the gradient by
the hidden states; the head's gradient is local.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from rlhf.kernels.token_stats.state import merge

# this module of PyTorch is not typed; groups are passed by name because operators cannot take group objects
_c10d: Any = distributed_c10d


def merge_over_ranks(state: Tensor, group: str) -> Tensor:
    """The state `[STATE_ROWS, n]` of the whole vocabulary, from the state of each rank's columns."""
    process_group = _c10d._resolve_process_group(group)
    parts = [torch.empty_like(state) for _ in range(process_group.size())]
    _c10d.all_gather(parts, state.contiguous(), group=process_group)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    return merged


class SumOverRanks:
    """An all-reduce (sum) of a tensor, in place and asynchronous."""

    def __init__(self, tensor: Tensor, group: str) -> None:
        process_group = _c10d._resolve_process_group(group)
        self._work: Any = _c10d.all_reduce(tensor, group=process_group, async_op=True)

    def wait(self) -> None:
        """Returns once the tensor holds the sum."""
        self._work.wait()
