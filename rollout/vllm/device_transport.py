"""Weights from the learner's GPU to a vLLM server's, through vLLM 0.32's own weight transfer.

    nccl    a broadcast in a group of two, the learner and one server, on different GPUs
    ipc     the server reads the learner's memory, on the same GPU

Both ends are vLLM's: `WeightTransferTrainerFactory` makes the one here, `--weight-transfer-config` the one of
the server, and what they say to each other goes through `Replica.call`, with its errors and deadlines.

1. A group for each server, so that one which is lost takes no other with it and a new one joins by itself.
   The price: servers are served one after the other, and n of them take n times as long as one.
2. What is sent are the learner's own tensors, not copies of them (of a model in shards what it is gathered
   to, on rank 0). They are let go when the learner goes on.
3. A transfer that does not end is aborted at the deadline, or when the server's process is gone: NCCL alone
   would wait for it for ever.
4. A server is told where the learner's memory is in plain numbers (`plain_handle`). vLLM's own client for
   HTTP pickles that, and servers would have to unpickle whatever they are sent.

Written against vLLM 0.32's interface, not yet run on a GPU. Tests run both ends on a CPU, all of it but what
moves the bytes: NCCL's broadcast and CUDA's memory handles.
"""

from __future__ import annotations

import base64
import importlib
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.rollout.engine import WeightSource
from rlhf.rollout.vllm.client import LOOK_EVERY, Replica, ReplicaError, free_port
from rlhf.rollout.vllm.in_process import require_vllm
from rlhf.rollout.vllm.process import process_left_alone
from rlhf.rollout.vllm.transport import Way
from rlhf.rollout.weight_proof import Sent, sent_weights

MODULES = "vllm.distributed.weight_transfer"
BUFFER = 256 << 20
"""Bytes that go at once; a larger weight goes alone."""
HANDLE = ("handle", "bytes", "offset", "counter", "counter_offset", "event", "waits")
"""What torch says of shared CUDA memory, beside its device, in its order."""


class DeviceTransport:
    """`way`: nccl or ipc. `dtype`: that the servers compute in."""

    def __init__(self, way: Way, dtype: torch.dtype) -> None:
        self._way, self._dtype = way, dtype
        self._held: Held | None = None
        self._ends: dict[Replica, Any] = {}
        self._sending = threading.Lock()
        with process_left_alone():
            require_vllm()
            self._factory: Any = importlib.import_module(f"{MODULES}.factory").WeightTransferTrainerFactory

    @property
    def published(self) -> bool:
        return self._held is not None

    def publish(self, source: WeightSource, version: int) -> tuple[int, Sent]:
        with self._sending:
            weights = [(name, _as_it_is(t, self._dtype)) for name, t in source.named_tensors()]
            self._held = held = Held(source.module, weights)
            # the streams they are sent on do not wait for the one they were written on
            if weights[0][1].is_cuda:
                torch.cuda.synchronize(weights[0][1].device)
            return held.bytes, sent_weights(held, version, self._dtype)

    def send(self, replica: Replica, deadline: float) -> bool:
        """Raises ReplicaError: the server did not take them, or is gone; it has to be started again."""
        with self._sending:
            held = self._held
            if held is None:
                return False
            try:
                end = self._ends.get(replica) or self._opened(replica, held, deadline)
                end.source = held
                self._watched(replica, deadline, end.send_weights, end.shutdown)
            except (RuntimeError, OSError) as error:
                self._close(replica)
                raise self._refusal(replica, str(error)) from error
            except ReplicaError:
                self._close(replica)
                raise
        # on a GPU the head is the embedding itself, elsewhere it has a copy of its own
        replica.worker("tandem_pack_head", deadline)
        return True

    def retire(self) -> None:
        """Waits for a server that is being served."""
        with self._sending:
            self._held = None

    def forget(self, replica: Replica) -> None:
        with self._sending:
            self._close(replica)

    def _opened(self, replica: Replica, held: Held, deadline: float) -> Any:
        """The learner's end of the transfer to a server, which has joined it."""
        client = Client(replica, deadline)
        client.shutdown_weight_transfer_engine()
        info, opened = self._init_info(replica, held), list[Any]()

        def open_end() -> None:
            opened.append(self._factory.trainer_init(info, client=client, source=held))

        self._watched(replica, deadline, open_end, lambda: None)
        self._ends[replica] = opened[0]
        return opened[0]

    def _init_info(self, replica: Replica, held: Held) -> Any:
        """vLLM's, with which it tells the server how the bytes are packed."""
        wire = {"rank": 0, "packed": True, "packed_buffer_size_bytes": max(BUFFER, held.largest)}
        if self._way == "ipc":
            return importlib.import_module(f"{MODULES}.ipc_engine").IPCTrainerInitInfo(**wire)
        engine: Any = importlib.import_module(f"{MODULES}.nccl_engine")
        address = address_towards(replica.url)
        return engine.NCCLTrainerInitInfo(
            master_address=address, master_port=free_port(address), world_size=2, **wire
        )

    def _watched(
        self, replica: Replica, deadline: float, action: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        """In a thread, which is aborted at the deadline or when the server is gone."""
        done, device = Future[None](), self._held and self._held.device

        def run() -> None:
            try:
                if device is not None and device.type == "cuda":
                    torch.cuda.set_device(device)
                action()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        until = time.monotonic() + deadline
        while True:
            try:
                return done.result(LOOK_EVERY)
            except NotDone:
                if done.done():
                    raise
            if replica.has_ended or time.monotonic() > until:
                abort()
                why = "it ended" if replica.has_ended else f"not done within {deadline:g} s"
                raise self._refusal(replica, why)

    def _refusal(self, replica: Replica, why: str) -> ReplicaError:
        return ReplicaError(
            f"{replica} was not given weights by {self._way}: {why} "
            "(rollout.vllm.transport=file goes another way)"
        )

    def _close(self, replica: Replica) -> None:
        end = self._ends.pop(replica, None)
        if end is not None:
            end.shutdown()


def _as_it_is(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter itself; anything else may be gone when the next one is asked for, and is copied."""
    return weight.detach().to(dtype, copy=not isinstance(weight, nn.Parameter))


@dataclass(frozen=True, slots=True)
class Weight:
    """As vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Held:
    """Weights as they are now: a source of this project's kind and of vLLM's."""

    def __init__(self, module: nn.Module, weights: Sequence[tuple[str, Tensor]]) -> None:
        self.module, self._weights = module, weights

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.named_tensors()

    def metadata(self) -> list[Weight]:
        return [Weight(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._weights]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self._weights)

    @property
    def largest(self) -> int:
        return max(tensor.nbytes for _, tensor in self._weights)

    @property
    def device(self) -> torch.device:
        return self._weights[0][1].device


class Client:
    """vLLM's protocol `VLLMWeightSyncClient`, spoken to one server."""

    def __init__(self, replica: Replica, deadline: float) -> None:
        self._replica, self._deadline = replica, deadline

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """With handles of memory through our part of the worker, which makes them of plain numbers."""
        if update_info.get("ipc_handles") is None:
            return self._post("/update_weights", {"update_info": update_info})
        handles = {gpu: plain_handle(args) for gpu, args in update_info["ipc_handles"].items()}
        rest = {key: v for key, v in update_info.items() if key != "ipc_handles" and v is not None}
        self._replica.worker("tandem_take", self._deadline, update_info=rest, handles=handles)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", weight_version and {"weight_version": weight_version})

    def shutdown_weight_transfer_engine(self) -> None:
        self._post("/shutdown_weight_transfer_engine")

    def _post(self, path: str, body: Any = None) -> None:
        self._replica.call("POST", path, body, timeout=self._deadline)


def plain_handle(arguments: Sequence[Any]) -> dict[str, Any]:
    """Of the arguments of torch's `rebuild_cuda_tensor`, for a buffer of bytes, what JSON can hold."""
    _, size, stride, offset, _, dtype, _, *memory = arguments
    memory.pop(HANDLE.index("counter"))  # whether it requires a gradient
    if dtype != torch.uint8 or len(size) != 1 or tuple(stride) != (1,) or offset:
        raise ValueError(f"a buffer of bytes was expected, got {dtype} of shape {tuple(size)}")
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in zip(HANDLE, memory, strict=True)
    }
    return {"size": size[0], **plain}


def rebuilding_arguments(plain: Mapping[str, Any]) -> tuple[Any, ...]:
    """Inverse of `plain_handle`; the receiver puts its own device in place 6."""
    memory = [base64.b64decode(v) if isinstance(v, str) else v for v in (plain[name] for name in HANDLE)]
    kind, storage = torch.Tensor, torch.storage.TypedStorage
    return (
        *(kind, torch.Size([plain["size"]]), (1,), 0, storage, torch.uint8, 0),
        *memory[:3],
        False,
        *memory[3:],
    )


def address_towards(url: str) -> str:
    """This host's, as a server can reach it."""
    there = urllib.parse.urlsplit(url)
    with socket.create_connection((there.hostname or "", there.port or 80)) as connection:
        return str(connection.getsockname()[0])
