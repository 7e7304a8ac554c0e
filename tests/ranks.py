"""Runs a function on several gloo ranks, in processes forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from tests.faults.processes import free_port


def together(ranks: int, work: Callable[..., None], *arguments: Any, patience: float = 240.0) -> None:
    """Runs `work` on `ranks` ranks. Fails unless each exits with 0 within `patience` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preloaded"])
    port = free_port()
    processes = [
        context.Process(target=_joined, args=(rank, ranks, port, work, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(patience)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks


def _joined(rank: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    work(*arguments)
