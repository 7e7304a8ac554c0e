"""Transport of weights to servers, without vLLM: choice of method, refused settings, deadlines."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.rollout.engine import EngineError
from rlhf.rollout.vllm.client import Replica, ReplicaError
from rlhf.rollout.vllm.device_transport import (
    DeviceTransport,
    PublishedWeights,
    plain_handle,
    rebuilding_arguments,
)
from rlhf.rollout.vllm.transport import Place, agreed_method, places


def test_servers_get_the_gpus_that_the_learner_leaves() -> None:
    assert places("auto", 3, 1, ["0", "1", "2"]) == [Place("nccl", gpu) for gpu in ("1", "2", "1")]
    assert places("auto", 2, 2, ["4", "5", "7"]) == [Place("nccl", "7")] * 2
    assert places("file", 1, 1, ["0", "1"]) == [Place("file", "1")]
    assert places("ipc", 2, 1, ["0", "1"]) == [Place("ipc", "0")] * 2


def test_without_a_gpu_of_their_own_servers_share_the_learners() -> None:
    assert places("auto", 2, 1, ["0"]) == [Place("ipc", "0")] * 2
    # rank 0, which sends, has only one of the GPUs
    assert places("auto", 3, 2, ["0", "1"]) == [Place("file", gpu) for gpu in ("0", "1", "0")]


def test_without_any_gpu_it_is_a_file() -> None:
    assert places("auto", 2, 1, []) == places("file", 2, 1, []) == [Place("file")] * 2
    assert Place("file").arguments == []
    option, value = Place("nccl", "1").arguments
    assert (option, json.loads(value)) == ("--weight-transfer-config", {"backend": "nccl"})


@pytest.mark.parametrize(
    ("asked", "ranks", "gpus", "said"),
    [
        ("nccl", 1, [], "PyTorch sees none: take auto or file"),
        ("ipc", 1, [], "PyTorch sees none: take auto or file"),
        ("nccl", 2, ["0", "1"], "all 2 visible ones are"),
        ("ipc", 2, ["0", "1"], "one rank; there are 2"),
    ],
)
def test_what_cannot_work_is_refused(asked: Any, ranks: int, gpus: list[str], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        places(asked, 1, ranks, gpus)


def test_a_server_that_somebody_else_started_says_its_method() -> None:
    assert agreed_method("S", "", "", "", "auto", 1) == "file"
    assert agreed_method("S", "", "GPU-1", "GPU-0", "auto", 4) == "file"
    assert agreed_method("S", "nccl", "GPU-1", "GPU-0", "auto", 4) == "nccl"
    assert agreed_method("S", "ipc", "GPU-0", "GPU-0", "ipc", 1) == "ipc"


@pytest.mark.parametrize(
    ("backend", "its", "ours", "asked", "ranks", "said"),
    [
        (
            "",
            "GPU-1",
            "GPU-0",
            "nccl",
            1,
            "from a file, .* start it with --weight-transfer-config",
        ),
        ("nccl", "GPU-1", "GPU-0", "file", 1, "by nccl, .* start it without --weight-transfer-config"),
        ("sparse_nccl", "GPU-1", "GPU-0", "auto", 1, "by sparse_nccl"),
        ("nccl", "GPU-1", "", "auto", 1, "the learner has no GPU"),
        ("nccl", "", "GPU-0", "auto", 1, "it has no GPU"),
        ("nccl", "GPU-0", "GPU-0", "auto", 1, "the learner's own GPU"),
        ("ipc", "GPU-1", "GPU-0", "auto", 1, "start it for nccl"),
        ("ipc", "GPU-0", "GPU-0", "auto", 2, "a learner of one rank"),
    ],
)
def test_a_server_that_cannot_be_served_is_refused(
    backend: str, its: str, ours: str, asked: Any, ranks: int, said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        agreed_method("S", backend, its, ours, asked, ranks)


def test_a_handle_of_memory_survives_json() -> None:
    """The arguments are as torch 2.13 gives them for a buffer of bytes on a GPU."""
    kind, storage = torch.Tensor, torch.storage.TypedStorage
    memory = (bytes(range(64)), 4096, 512, False, b"\x00counter", 7, b"event\xff", True)
    arguments = (kind, torch.Size([3000]), (1,), 0, storage, torch.uint8, 0, *memory)
    plain = json.loads(json.dumps(plain_handle(arguments)))
    assert rebuilding_arguments(plain) == arguments
    # the key of vLLM's cache of mapped memory
    assert isinstance(hash(rebuilding_arguments(plain)), int)
    with pytest.raises(ValueError, match="expected a buffer of bytes"):
        plain_handle((kind, torch.Size([3, 2]), (2, 1), 0, storage, torch.uint8, 0, *memory))


@pytest.fixture
def server(tmp_path: Path) -> Replica:
    return Replica("http://127.0.0.1:1", None, tmp_path)


@pytest.mark.parametrize("ended", [False, True], ids=["frozen", "killed"])
def test_a_transfer_that_does_not_end_is_aborted_and_named(server: Replica, ended: bool) -> None:
    transport: Any = DeviceTransport.__new__(DeviceTransport)
    transport._method, transport._held = (
        "nccl",
        PublishedWeights(torch.nn.Identity(), [("w", torch.zeros(1))]),
    )
    aborted = threading.Event()
    if ended:
        server.end()
    said = "it ended" if ended else "not done within 0.1 s"
    with pytest.raises(ReplicaError, match=f"{server} was not given weights by nccl: {said}"):
        transport._watched(server, 300.0 if ended else 0.1, aborted.wait, aborted.set)
    assert aborted.is_set()


def test_what_goes_wrong_in_a_transfer_is_raised(server: Replica) -> None:
    transport: Any = DeviceTransport.__new__(DeviceTransport)
    transport._method, transport._held = (
        "nccl",
        PublishedWeights(torch.nn.Identity(), [("w", torch.zeros(1))]),
    )

    def broken() -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    with pytest.raises(RuntimeError, match="unhandled system error"):
        transport._watched(server, 300.0, broken, lambda: None)
