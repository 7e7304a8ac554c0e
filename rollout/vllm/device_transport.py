"""Sends weights from the learner's GPU to a vLLM server's GPU, by vLLM 0.32's weight transfer (nccl, ipc).

    nccl    a broadcast in a group of two, the learner and one server, on different GPUs
    ipc     the server reads the learner's memory, on the same GPU

Both ends are vLLM's: `WeightTransferTrainerFactory` makes the learner's, `--weight-transfer-config` the
server's. Their control messages go through `Replica.call`, with its errors and deadlines.

1. Each server has a group of its own, so that a lost server does not break the others' and a new one can join
   alone. The price: servers are served one after the other, so n of them take n times as long as one.
2. The learner's own tensors are sent, not copies (for a sharded model the tensors gathered on rank 0). They
   are released when the learner goes on.
3. A transfer that does not end is aborted at the deadline, or when the server's process has ended: NCCL
   itself would wait forever.
4. The handle of the learner's memory is sent as plain numbers (`plain_handle`). vLLM's HTTP client would
   pickle it, and servers would have to unpickle whatever they are sent.

Written for vLLM 0.32's interface, not yet run on a GPU. Tests run both ends on a CPU, with replacements only
for what moves the bytes: NCCL's broadcast and CUDA's memory handles.
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
from rlhf.rollout.vllm.client import POLL_INTERVAL, Replica, ReplicaError, free_port
from rlhf.rollout.vllm.in_process import require_vllm
from rlhf.rollout.vllm.isolation import restored_process_state
from rlhf.rollout.vllm.transport import TransportMethod
from rlhf.rollout.weight_proof import Sent, sent_weights

MODULES = "vllm.distributed.weight_transfer"
BUFFER = 256 << 20
"""Bytes of the buffer in which weights are packed and sent; a larger weight is sent alone."""
HANDLE = ("handle", "bytes", "offset", "counter", "counter_offset", "event", "waits")
"""Names of torch's arguments for shared CUDA memory after its device, in their order."""


class DeviceTransport:
    """`method` is nccl or ipc, `dtype` the one that the servers compute in."""

    def __init__(self, method: TransportMethod, dtype: torch.dtype) -> None:
        self._method, self._dtype = method, dtype
        self._held: PublishedWeights | None = None
        self._ends: dict[Replica, Any] = {}
        self._sending = threading.Lock()
        with restored_process_state():
            require_vllm()
            self._factory: Any = importlib.import_module(f"{MODULES}.factory").WeightTransferTrainerFactory

    @property
    def published(self) -> bool:
        return self._held is not None

    def publish(self, source: WeightSource, version: int) -> tuple[int, Sent]:
        with self._sending:
            weights = [(name, _tensor_to_send(t, self._dtype)) for name, t in source.named_tensors()]
            self._held = held = PublishedWeights(source.module, weights)
            # the streams that send the weights do not wait for the stream that wrote them
            if weights[0][1].is_cuda:
                torch.cuda.synchronize(weights[0][1].device)
            return held.bytes, sent_weights(held, version, self._dtype)

    def send(self, replica: Replica, deadline: float) -> bool:
        """Raises ReplicaError if the server failed to take the weights; it must then be restarted."""
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
        # needed on a CPU, where a head tied to the embedding has a packed copy of its own
        replica.worker("tandem_pack_head", deadline)
        return True

    def retire(self) -> None:
        """Releases the weights, after a transfer in progress."""
        with self._sending:
            self._held = None

    def forget(self, replica: Replica) -> None:
        with self._sending:
            self._close(replica)

    def _opened(self, replica: Replica, held: PublishedWeights, deadline: float) -> Any:
        """Makes the learner's end of the transfer to a server, once the server has joined."""
        client = Client(replica, deadline)
        client.shutdown_weight_transfer_engine()
        info, opened = self._init_info(replica, held), list[Any]()

        def open_end() -> None:
            opened.append(self._factory.trainer_init(info, client=client, source=held))

        self._watched(replica, deadline, open_end, lambda: None)
        self._ends[replica] = opened[0]
        return opened[0]

    def _init_info(self, replica: Replica, held: PublishedWeights) -> Any:
        """vLLM's settings of the transfer, which also tell the server how bytes are packed."""
        wire = {"rank": 0, "packed": True, "packed_buffer_size_bytes": max(BUFFER, held.largest)}
        if self._method == "ipc":
            return importlib.import_module(f"{MODULES}.ipc_engine").IPCTrainerInitInfo(**wire)
        engine: Any = importlib.import_module(f"{MODULES}.nccl_engine")
        address = address_towards(replica.url)
        return engine.NCCLTrainerInitInfo(
            master_address=address, master_port=free_port(address), world_size=2, **wire
        )

    def _watched(
        self, replica: Replica, deadline: float, action: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        """Runs `action` in a thread, and `abort` at the deadline or when the server's process has ended."""
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
                return done.result(POLL_INTERVAL)
            except NotDone:
                if done.done():
                    raise
            if replica.has_ended or time.monotonic() > until:
                abort()
                why = "it ended" if replica.has_ended else f"not done within {deadline:g} s"
                raise self._refusal(replica, why)

    def _refusal(self, replica: Replica, why: str) -> ReplicaError:
        return ReplicaError(
            f"{replica} was not given weights by {self._method}: {why} "
            "(rollout.vllm.transport=file does without a transfer between GPUs)"
        )

    def _close(self, replica: Replica) -> None:
        end = self._ends.pop(replica, None)
        if end is not None:
            end.shutdown()


def _tensor_to_send(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter itself, or a copy of any other tensor, which may be freed when the next is requested."""
    return weight.detach().to(dtype, copy=not isinstance(weight, nn.Parameter))


@dataclass(frozen=True, slots=True)
class Weight:
    """Metadata of a weight with the attributes of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PublishedWeights:
    """The weights of the last `publish`, with the interfaces of `WeightSource` and of vLLM's sources."""

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
    """vLLM's protocol `VLLMWeightSyncClient` for one server."""

    def __init__(self, replica: Replica, deadline: float) -> None:
        self._replica, self._deadline = replica, deadline

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Sends handles of memory as plain numbers, which `HeldWeights.tandem_take` turns into handles."""
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
    """The arguments of torch's `rebuild_cuda_tensor` for a buffer of bytes, in values that JSON can hold."""
    _, size, stride, offset, _, dtype, _, *memory = arguments
    memory.pop(HANDLE.index("counter"))  # whether it requires a gradient
    if dtype != torch.uint8 or len(size) != 1 or tuple(stride) != (1,) or offset:
        raise ValueError(f"expected a buffer of bytes, got {dtype} of shape {tuple(size)}")
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in zip(HANDLE, memory, strict=True)
    }
    return {"size": size[0], **plain}


def rebuilding_arguments(plain: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inverse of `plain_handle`; the receiver sets argument 6 to its own device."""
    memory = [base64.b64decode(v) if isinstance(v, str) else v for v in (plain[name] for name in HANDLE)]
    kind, storage = torch.Tensor, torch.storage.TypedStorage
    return (
        *(kind, torch.Size([plain["size"]]), (1,), 0, storage, torch.uint8, 0),
        *memory[:3],
        False,
        *memory[3:],
    )


def address_towards(url: str) -> str:
    """The address at which a server can reach this host."""
    there = urllib.parse.urlsplit(url)
    with socket.create_connection((there.hostname or "", there.port or 80)) as connection:
        return str(connection.getsockname()[0])
