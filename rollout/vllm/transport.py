"""How weights get from the learner to a vLLM server: one object a way, all with the same steps.

    publish     once an update: the learner's weights as they are now, and digests of them
    send        to one server, at once or when it comes back
    retire      the learner goes on and will change its weights
    forget      a server was lost

1. `file`: one safetensors file in shared memory, which every server reads. It stays as it was when the
   learner goes on. The only way where there is no GPU.
2. `nccl`, `ipc` (rollout/vllm_device.py): from the learner's GPU to a server's, without a copy through the
   host. They send the learner's own tensors, so after `retire` there is nothing to send until the next
   `publish`: a server that comes back meanwhile waits for it.

Servers that are started here get their GPU and their way from `places`; the others are asked (`way_of`).
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
from rlhf.rollout.vllm.client import PATIENCE, Replica
from rlhf.rollout.weight_file import WeightFile
from rlhf.rollout.weight_proof import Aliases, Sent, digest, looked_at

Way = Literal["file", "nccl", "ipc"]
Asked = Literal["auto", "file", "nccl", "ipc"]
_WAYS: dict[str, Way] = {"": "file", "nccl": "nccl", "ipc": "ipc"}


@runtime_checkable
class Transport(Protocol):
    """One way."""

    @property
    def published(self) -> bool:
        """Whether there is something to send now."""
        ...

    def publish(self, source: WeightSource, version: int) -> tuple[int, Sent]:
        """Bytes that each server is sent, and what they are compared with."""
        ...

    def send(self, replica: Replica, deadline: float) -> bool:
        """Whether the server has taken them; False: there is nothing to send now. Raises ReplicaError."""
        ...

    def retire(self) -> None: ...

    def forget(self, replica: Replica) -> None: ...


class FileTransport:
    """Under the names of the Hugging Face layout, one weight at a time."""

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
                digests |= dict.fromkeys(aliases.of(sent), digest(looked_at(weight, version)))
        written.replace(self._path)

        def part(name: str) -> Tensor:
            # its annotations are too incomplete for a strict check
            library: Any = importlib.import_module("safetensors")
            with library.safe_open(self._path, framework="pt") as saved:
                held = set(saved.keys())
                weight = saved.get_tensor(next(other for other in aliases.of(name) if other in held))
            return looked_at(weight, version)

        return file.bytes, Sent(digests, part)

    def send(self, replica: Replica, deadline: float) -> bool:
        replica.worker("tandem_load", deadline, path=str(self._path))
        return True

    def retire(self) -> None:
        """The file stays as it is."""

    def forget(self, replica: Replica) -> None:
        """A server has nothing of ours but what it has read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of a server that is started here. `gpu`: as CUDA_VISIBLE_DEVICES names it; None: there is none."""

    way: Way
    gpu: str | None = None

    @property
    def arguments(self) -> list[str]:
        """Of its command line."""
        return [] if self.way == "file" else ["--weight-transfer-config", json.dumps({"backend": self.way})]


def places(asked: Asked, replicas: int, ranks: int, gpus: Sequence[str]) -> list[Place]:
    """Of `replicas` servers beside a learner of `ranks`, which have the first of the `gpus`, one each.

    Servers take the rest in turn; where there is no rest, they share those of the learner. "auto" is `nccl`
    for servers with GPUs of their own, `ipc` for those on the GPU of the only rank, and `file` where several
    ranks share theirs: rank 0, which sends, has one GPU.

    Raises EngineError: what is asked for cannot work.
    """
    rest, shared = list(gpus[ranks:]), list(gpus[:ranks])
    if asked in ("nccl", "ipc") and not gpus:
        raise EngineError(
            f"rollout.vllm.transport is {asked}, which moves weights between GPUs, and PyTorch sees none: "
            "take auto or file"
        )
    if asked == "nccl" and not rest:
        raise EngineError(
            "rollout.vllm.transport is nccl, which needs a GPU for the servers that is not the learner's: "
            f"all {len(gpus)} visible ones are. Take auto, ipc or file, or let it see more of them"
        )
    if asked == "ipc" and ranks > 1:
        raise EngineError(
            "rollout.vllm.transport is ipc, which serves servers on the GPU of a learner of one rank; there "
            f"are {ranks}: take auto, nccl or file"
        )
    if not gpus:
        return [Place("file")] * replicas
    used = shared if asked == "ipc" else rest or shared
    auto: Way = "nccl" if rest else "ipc" if ranks == 1 else "file"
    return [Place(auto if asked == "auto" else asked, used[i % len(used)]) for i in range(replicas)]


def way_of(replica: Replica, asked: Asked, ranks: int) -> Way:
    """The way that a server was started for, as it says. Raises EngineError: it cannot serve this learner."""
    said = replica.worker("tandem_transport", PATIENCE)
    return agreed(str(replica), said["backend"], said["gpu"], this_gpu(), asked, ranks)


def agreed(server: str, backend: str, its: str, ours: str, asked: Asked, ranks: int) -> Way:
    """`backend`: of `--weight-transfer-config`. `its`, `ours`: GPUs of server and learner. Empty: none."""
    started = f"{server} was started to get weights {f'by {backend}' if backend else 'from a file'}"
    way = _WAYS.get(backend)
    if way is None or asked not in ("auto", way):
        start = " ".join(Place("nccl" if asked == "auto" else asked).arguments)
        raise EngineError(
            f"{started}, and rollout.vllm.transport is {asked}: start it "
            f"{'with ' + start if start else 'without --weight-transfer-config'}"
        )
    if way != "file" and not (its and ours):
        raise EngineError(f"{started}, and {'it' if ours else 'the learner'} has no GPU: start it for a file")
    if way == "nccl" and its == ours:
        raise EngineError(f"{started}, which is not possible on the learner's own GPU: start it for ipc")
    if way == "ipc" and (its != ours or ranks > 1):
        raise EngineError(f"{started}, which is for the GPU of a learner of one rank: start it for nccl")
    return way


def this_gpu() -> str:
    return gpu_of("cuda") if torch.cuda.is_available() else ""


def gpu_of(device: torch.device | str) -> str:
    """The name that it has in every process."""
    cuda: Any = torch.cuda
    return str(cuda.get_device_properties(device).uuid)
