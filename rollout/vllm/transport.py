"""How weights get to vLLM servers: the protocol, the transport by file, and which method and GPU are used.

    publish     once per update: takes the learner's current weights and computes digests of them
    send        sends them to one server, at once or after its restart
    retire      the learner goes on and will change its weights
    forget      a server was lost

1. `file`: one safetensors file in shared memory, which every server reads. It does not change when the
   learner goes on. The only method without a GPU.
2. `nccl`, `ipc` (device_transport.py): from the learner's GPU to a server's, without a copy through the host.
   They send the learner's own tensors, so after `retire` there is nothing to send until the next `publish`: a
   server that is restarted meanwhile waits for it.

Servers that are started here get their GPU and method from `places`; running ones are asked (`method_of`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf.rollout.engine import EngineError, WeightSource
from rlhf.rollout.vllm.client import ANSWER_TIMEOUT, Replica
from rlhf.rollout.weight_file import WeightFile
from rlhf.rollout.weight_proof import Aliases, Sent, compared_share, digest

TransportMethod = Literal["file", "nccl", "ipc"]
TransportSetting = Literal["auto", "file", "nccl", "ipc"]
_METHODS: dict[str, TransportMethod] = {"": "file", "nccl": "nccl", "ipc": "ipc"}


@runtime_checkable
class Transport(Protocol):
    """One method of sending weights to servers."""

    @property
    def published(self) -> bool:
        """Whether there are weights to send now."""
        ...

    def publish(self, source: WeightSource, version: int) -> tuple[int, Sent]:
        """Takes the weights; returns the bytes that each server is sent, and what to compare it with."""
        ...

    def send(self, replica: Replica, deadline: float) -> bool:
        """Sends them; False if there is nothing to send now. Raises ReplicaError if the server fails."""
        ...

    def retire(self) -> None: ...

    def forget(self, replica: Replica) -> None: ...


class FileTransport:
    """Writes a file in the Hugging Face layout, one weight at a time, which the servers read."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._path, self._dtype = path, dtype

    @property
    def published(self) -> bool:
        return self._path.exists()

    def publish(self, source: WeightSource, version: int) -> tuple[int, Sent]:
        aliases, digests = Aliases(source), dict[str, str]()
        written = self._path.with_suffix(".new")
        with WeightFile(written, aliases.all) as file:
            for sent, tensor in source.named_tensors():
                weight = tensor.detach().to("cpu", self._dtype)
                file.add(sent, weight)
                digests |= dict.fromkeys(aliases.of(sent), digest(compared_share(weight, version)))
        written.replace(self._path)

        def part(name: str) -> Tensor:
            # safetensors' annotations are too incomplete for a strict check
            library: Any = importlib.import_module("safetensors")
            with library.safe_open(self._path, framework="pt") as saved:
                held = set(saved.keys())
                weight = saved.get_tensor(next(other for other in aliases.of(name) if other in held))
            return compared_share(weight, version)

        return file.bytes, Sent(digests, part)

    def send(self, replica: Replica, deadline: float) -> bool:
        replica.worker("tandem_load", deadline, path=str(self._path))
        return True

    def retire(self) -> None:
        """Does nothing: the file does not change with the learner's weights."""

    def forget(self, replica: Replica) -> None:
        """Does nothing: no state is kept per server."""


@dataclass(frozen=True, slots=True)
class Place:
    """Transport and GPU of a server that is started here, named as in CUDA_VISIBLE_DEVICES; None: no GPU."""

    method: TransportMethod
    gpu: str | None = None

    @property
    def arguments(self) -> list[str]:
        """The server's command-line arguments for the transport."""
        if self.method == "file":
            return []
        return ["--weight-transfer-config", json.dumps({"backend": self.method})]


def places(asked: TransportSetting, replicas: int, ranks: int, gpus: Sequence[str]) -> list[Place]:
    """Transport and GPU of each of `replicas` servers; the learner's `ranks` have the first `gpus`, one each.

    Servers take the other GPUs in turn, or share the learner's if there are no others. "auto" is `nccl` for
    servers with GPUs of their own, `ipc` for servers on the GPU of a single rank, and `file` for servers that
    share the GPUs of several ranks (rank 0, which sends, has only one of them).

    Raises EngineError if `asked` cannot work.
    """
    free, learners = list(gpus[ranks:]), list(gpus[:ranks])
    if asked in ("nccl", "ipc") and not gpus:
        raise EngineError(
            f"rollout.vllm.transport is {asked}, which sends weights between GPUs, and PyTorch sees none: "
            "take auto or file"
        )
    if asked == "nccl" and not free:
        raise EngineError(
            "rollout.vllm.transport is nccl, which needs a GPU for the servers that is not the learner's: "
            f"all {len(gpus)} visible ones are. Take auto, ipc or file, or make more GPUs visible"
        )
    if asked == "ipc" and ranks > 1:
        raise EngineError(
            "rollout.vllm.transport is ipc, which is for servers on the GPU of a learner of one rank; there "
            f"are {ranks} ranks: take auto, nccl or file"
        )
    if not gpus:
        return [Place("file")] * replicas
    used = learners if asked == "ipc" else free or learners
    auto: TransportMethod = "nccl" if free else "ipc" if ranks == 1 else "file"
    return [Place(auto if asked == "auto" else asked, used[i % len(used)]) for i in range(replicas)]


def method_of(replica: Replica, asked: TransportSetting, ranks: int) -> TransportMethod:
    """The method that a running server was started for. Raises EngineError if it does not fit the learner."""
    server = replica.worker("tandem_transport", ANSWER_TIMEOUT)
    return agreed_method(str(replica), server["backend"], server["gpu"], this_gpu(), asked, ranks)


def agreed_method(
    server: str, backend: str, server_gpu: str, learner_gpu: str, asked: TransportSetting, ranks: int
) -> TransportMethod:
    """The transport that server and learner can both use. Raises EngineError if there is none.

    `backend` is that of the server's `--weight-transfer-config`; it and the GPUs are empty if there are none.
    """
    started = f"{server} was started to get weights {f'by {backend}' if backend else 'from a file'}"
    method = _METHODS.get(backend)
    if method is None or asked not in ("auto", method):
        flag = " ".join(Place("nccl" if asked == "auto" else asked).arguments)
        raise EngineError(
            f"{started}, and rollout.vllm.transport is {asked}: start it "
            f"{'with ' + flag if flag else 'without --weight-transfer-config'}"
        )
    if method != "file" and not (server_gpu and learner_gpu):
        raise EngineError(
            f"{started}, and {'it' if learner_gpu else 'the learner'} has no GPU: start it for a file"
        )
    if method == "nccl" and server_gpu == learner_gpu:
        raise EngineError(f"{started}, which is not possible on the learner's own GPU: start it for ipc")
    if method == "ipc" and (server_gpu != learner_gpu or ranks > 1):
        raise EngineError(f"{started}, which is for the GPU of a learner of one rank: start it for nccl")
    return method


def this_gpu() -> str:
    """The UUID of the current GPU; empty without one."""
    return gpu_of("cuda") if torch.cuda.is_available() else ""


def gpu_of(device: torch.device | str) -> str:
    """The GPU's UUID, which is the same in every process."""
    cuda: Any = torch.cuda
    return str(cuda.get_device_properties(device).uuid)
