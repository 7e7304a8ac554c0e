"""The ranks of a run: joins them, splits work between them, and sums and gathers over them; derived seeds.

Each rank samples its share of the prompts and adds its gradient to those of the others. A process without
torchrun is a world of one rank. All sums over ranks go through `World`.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.devices import keep_freed_memory, this_device
from rlhf.distributed.watchdog import RankError, Watchdog, deadline, lost_connection
from rlhf.metrics import Metrics, merge
from rlhf.torch_typed import copy_all

# its annotations are too incomplete for a strict check
_dist: Any = dist


class World:
    """This process among the ranks of a run."""

    def __init__(self, rank: int, size: int, device: torch.device, watchdog: Watchdog | None = None) -> None:
        self.rank, self.size, self.device, self.watchdog = rank, size, device, watchdog

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> int:
        """How many of `total` items this rank gets; the shares of all ranks add up to `total`."""
        return total // self.size + (self.rank < total % self.size)

    def at(self, phase: str) -> None:
        """Tells the other ranks which phase this rank enters, for their error messages."""
        if self.watchdog is not None:
            self.watchdog.at(phase)

    def check_others(self) -> None:
        """Raises RankError when another rank is known to have failed or died.

        For code that waits for other ranks without a collective, such as for their files.
        """
        if self.watchdog is not None:
            self.watchdog.raise_if_another_failed()

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.watchdog is None else self.watchdog.waiting()

    def peak_memory_gib(self) -> float:
        """Peak memory in GiB: of tensors on the GPU if there is one, else resident memory of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        # ru_maxrss is in KiB on Linux and in bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, bit for bit the same on each; `tensor` stays as it is."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        with self._waiting():
            _dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, gradients: Iterable[Tensor], bucket_bytes: int = 64 << 20) -> None:
        """Sums gradients over the ranks, in place, with one collective for each bucket of `bucket_bytes`."""
        if self.size == 1:
            return
        with self._waiting():
            self._sum_in_buckets(gradients, bucket_bytes)

    def _sum_in_buckets(self, gradients: Iterable[Tensor], bucket_bytes: int) -> None:
        bucket: list[Tensor] = []
        for gradient in gradients:
            bucket.append(gradient)
            if sum(g.nbytes for g in bucket) >= bucket_bytes:
                _reduce(bucket)
                bucket = []
        if bucket:
            _reduce(bucket)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. They are pickled, so they should be small plain objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._waiting():
            _dist.all_gather_object(values, value)
        return values

    def merge(self, metrics: Metrics) -> Metrics:
        """Merges the partial metrics of all ranks."""
        return merge(self.gather(metrics))


def _reduce(bucket: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in bucket])
    _dist.all_reduce(flat)
    parts = torch.split(flat, [g.numel() for g in bucket])
    copy_all(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


def world_size() -> int:
    """How many ranks were started, known from the environment before they join."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(timeout: float = 1800.0) -> Generator[World]:
    """Joins the ranks that torchrun or `accelerate launch` started, and leaves them at the end.

    `timeout`: seconds that a rank may wait for the others. Raises RankError when a collective fails because
    of another rank, which the message names.
    """
    size, rank, device = world_size(), int(os.environ.get("RANK", "0")), this_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if size == 1:
        yield World(rank, size, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=deadline(timeout))
    try:
        with Watchdog(rank, size, timeout) as watchdog:
            try:
                yield World(rank, size, device, watchdog)
            except RuntimeError as error:
                if isinstance(error, RankError) or not lost_connection(error):
                    raise
                raise watchdog.explain(error) from error
    finally:
        dist.destroy_process_group()


def derive_seed(*parts: int | str) -> int:
    """A seed of 62 bits, derived from its purpose: `derive_seed(run_seed, "rollout", position)`.

    It is the same on every machine and in every process (unlike `hash`), so no state of a generator has to be
    stored in checkpoints.
    """
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2
