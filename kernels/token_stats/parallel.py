"""A vocabulary spread over ranks: each folds its own columns, one all-gather merges the rows' states.

Every rank merges all states in rank order, so all have the same bits. Backward needs one sum over ranks,
of the gradient by the hidden states; the head's gradient is local.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _resolve_process_group,  # pyright: ignore[reportPrivateUsage]  # an operator's argument is a name
)

from rlhf.kernels.token_stats.state import merge


def merge_over_ranks(state: Tensor, group: str) -> Tensor:
    """The state `[STATE_ROWS, n]` over all ranks' columns, from each rank's own."""
    process_group = _resolve_process_group(group)
    parts = [torch.empty_like(state) for _ in range(process_group.size())]
    dist.all_gather(parts, state.contiguous(), group=process_group)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    return merged


class SumOverRanks:
    """A sum of a tensor over ranks, in place, while other work goes on."""

    def __init__(self, tensor: Tensor, group: str) -> None:
        self._work = dist.all_reduce(tensor, group=_resolve_process_group(group), async_op=True)

    def wait(self) -> None:
        """Return once the tensor holds the sum."""
        if self._work is not None:
            self._work.wait()
