"""A vocabulary spread over ranks: each folds its own columns, one all-gather merges the rows' states.

Every rank merges all states in rank order, so all have the same bits. Backward needs one sum over ranks,
of the gradient by the hidden states; the head's gradient is local.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from rlhf.kernels.token_stats.state import merge

# untyped in PyTorch; a group is found by its name because an operator cannot take the group itself
_c10d: Any = distributed_c10d


def merge_over_ranks(state: Tensor, group: str) -> Tensor:
    """The state `[STATE_ROWS, n]` over all ranks' columns, from each rank's own."""
    process_group = _c10d._resolve_process_group(group)
    parts = [torch.empty_like(state) for _ in range(process_group.size())]
    _c10d.all_gather(parts, state.contiguous(), group=process_group)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    return merged


class SumOverRanks:
    """A sum of a tensor over ranks, in place, while other work goes on."""

    def __init__(self, tensor: Tensor, group: str) -> None:
        process_group = _c10d._resolve_process_group(group)
        self._work: Any = _c10d.all_reduce(tensor, group=process_group, async_op=True)

    def wait(self) -> None:
        """Return once the tensor holds the sum."""
        self._work.wait()
