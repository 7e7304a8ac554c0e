"""A head spread over ranks gives what one rank gives, and every rank the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.kernels.token_stats.api import Memory
from rlhf.kernels.token_stats.state import STATE_ROWS, finish, merge
from tests.kernels import ranks
from tests.kernels.cases import FIELDS, assert_close, exact
from tests.ranks import together


@pytest.mark.multi
@pytest.mark.parametrize(
    ("count", "dtype", "memory", "tolerance"),
    [(2, torch.float64, "keep", 1e-10), (4, torch.float32, "recompute", 2e-6)],
)
def test_shards_on_ranks_give_what_one_rank_gives(
    count: int, dtype: torch.dtype, memory: Memory, tolerance: float, tmp_path: Path
) -> None:
    together(count, ranks.run, str(tmp_path), dtype, memory)
    results: list[dict[str, Tensor]] = [
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)
    ]
    for name in (*FIELDS, "d_hidden"):
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:])
    joined = dict(results[0])
    for name in ("d_weight", "d_bias"):
        joined[name] = torch.cat([result[name] for result in results])
    assert_close(joined, exact(ranks.whole(dtype)), relative=tolerance)


def test_states_merge_in_any_grouping() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(STATE_ROWS, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    for rank, part in enumerate(parts):
        part[-3:] = 0
        if rank == 1:
            part[-3:] = torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64)[:, None]
    wanted = frozenset(FIELDS)
    left = finish(merge(merge(parts[0], parts[1]), parts[2]), wanted)
    right = finish(merge(parts[0], merge(parts[1], parts[2])), wanted)
    for name in FIELDS:
        torch.testing.assert_close(left[0][name], right[0][name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left[1], right[1], rtol=1e-12, atol=1e-12)
