"""The program of each rank of `test_vocabulary_parallel.py`: its shard of the head, and all tokens."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rlhf.kernels.token_stats import token_stats
from rlhf.kernels.token_stats.api import Memory
from tests.kernels.cases import Case, make_case, measured

# uneven parts of 41 columns, among them one of a single column
EDGES = {2: [0, 10, 41], 4: [0, 10, 11, 24, 41]}


def whole(dtype: torch.dtype) -> Case:
    """The case of which each rank has a shard."""
    return make_case(
        9, 6, 41, dtype=dtype, bias=True, softcap=5.0, vector_temperature=True, masked=0.3, logit_scale=0.7
    )


def run(folder: str, dtype: torch.dtype, memory: Memory) -> None:
    """Computes statistics and gradients with this rank's shard and saves them."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    case = whole(dtype)
    mine = slice(*EDGES[ranks][rank : rank + 2])
    parts = {name: getattr(case, name)[mine] for name in ("weight", "bias", "ref_weight", "ref_bias")}
    got = measured(
        replace(case, **parts), backend="tiled", memory=memory, group=group, vocab_start=mine.start
    )
    torch.save(got, Path(folder) / f"{rank}.pt")
    outside = token_stats(
        case.hidden, parts["weight"], torch.full((9,), 41), group=group, vocab_start=mine.start
    )
    assert outside.logprob is not None and outside.logprob.isnan().all()
    assert outside.entropy is not None and outside.entropy.isfinite().all()
    sharded_as_a_whole(rank, ranks)
    dist.destroy_process_group()


def sharded_as_a_whole(rank: int, ranks: int) -> None:
    """As under FSDP: every rank has its own tokens and a shard of the head, gathered for the call."""
    case = make_case(2 * ranks, 6, 41, bias=True)
    mesh = init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    own = slice(2 * rank, 2 * rank + 2)
    stats = token_stats(case.hidden[own], weight, case.targets[own])
    assert stats.logprob is not None
    stats.logprob.sum().backward()
    assert isinstance(weight.grad, DTensor)
    plain = case.weight.clone().requires_grad_()
    expected = token_stats(case.hidden, plain, case.targets).logprob
    assert expected is not None and plain.requires_grad
    expected.sum().backward()
    torch.testing.assert_close(weight.grad.full_tensor(), plain.grad)
