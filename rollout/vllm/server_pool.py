"""The pool of vLLM servers: starts them, sends them weights, and restarts those that are lost."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rlhf.devices import visible_gpus
from rlhf.rollout.engine import EngineError, SyncError, WeightSource
from rlhf.rollout.vllm.adapter import ADAPTER_NAME, adapted_source, prove_adapted, write_adapter
from rlhf.rollout.vllm.client import ANSWER_TIMEOUT, Replica, ReplicaError
from rlhf.rollout.vllm.device_transport import DeviceTransport
from rlhf.rollout.vllm.in_process import VLLMModel
from rlhf.rollout.vllm.transport import (
    FileTransport,
    Place,
    Transport,
    TransportMethod,
    TransportSetting,
    method_of,
    places,
)
from rlhf.rollout.weight_proof import Proven, differing, prove

SHARED_MEMORY = Path("/dev/shm")
POLL_INTERVAL = 0.5
MAX_FAILURES = 3
"""Most losses of a server in a row; after one more it is not restarted."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """Settings of the servers.

    `urls` are those of servers that already run; without any, `replicas` servers are started here. `deadline`
    is in seconds. `transport` is how they get weights. `ranks` is the number of ranks of the learner.
    """

    replicas: int = 1
    urls: tuple[str, ...] = ()
    deadline: float = 600.0
    transport: TransportSetting = "auto"
    ranks: int = 1


class ServerPool:
    """The servers of a run. Raises EngineError if one does not start, answer, or have what is needed."""

    def __init__(self, model: VLLMModel, service: Service) -> None:
        self._model, self._service = model, service
        if service.urls:
            found: list[tuple[str, Place | None]] = [(url, None) for url in service.urls]
        else:
            placed = places(service.transport, service.replicas, service.ranks, visible_gpus())
            found = [("", place) for place in placed]
        shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="tandem-vllm-", dir=shared))
        arguments = command_line(model)
        image_model = None if model.image_format is None else model.image_format.kind
        self.replicas = [
            Replica(url, None, self.folder)
            if place is None
            else Replica(url, [*arguments, *place.arguments], self.folder, image_model, place.gpu)
            for url, place in found
        ]
        self._version = 0
        self._base: WeightSource | None = None
        self._proven: Proven | None = None
        self._closed = False
        self._transport: Transport = FileTransport(self.folder / "weights.safetensors", model.dtype)
        self.lost = 0
        """Number of losses of servers so far."""
        try:
            self._in_parallel(self._start, self.replicas)
            self._transport = self._transport_for([place for _, place in found])
        except (EngineError, ReplicaError) as error:
            self.close()
            raise EngineError(str(error)) from error

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.ready]

    @property
    def given_up(self) -> bool:
        return all(replica.failures > MAX_FAILURES for replica in self.replicas)

    def why_none_is_left(self) -> str:
        reasons = "; ".join(replica.reason for replica in self.replicas)
        return f"no vllm server is left to sample from: {reasons}"

    def post_to_all(self, path: str, on_lost: Callable[[Replica, str], None]) -> None:
        """Posts to all servers; `on_lost` is called with each that fails and the reason."""
        timeout = min(ANSWER_TIMEOUT, self._service.deadline)

        def post(replica: Replica) -> None:
            replica.call("POST", path, timeout=timeout)

        self._or_lose(post, on_lost, self.ready)

    def update(self, source: WeightSource, version: int, on_lost: Callable[[Replica, str], None]) -> int:
        """Sends weights to all servers and verifies them; returns the bytes sent to each.

        A server that is lost gets them after its restart. Raises SyncError if a server does not hold what it
        was sent, EngineError if no server is left.
        """
        self._version, self._proven = version, None
        adapted = adapted_source(source, self._model.lora_rank)
        base = source if adapted is None else adapted.base
        size, sent = 0, None
        if adapted is None or base is not self._base or not self._transport.published:
            size, sent = self._transport.publish(base, version)
            self._base = base
        if adapted is not None:
            size += write_adapter(self._adapter, adapted.adapter, self._model.dtype)
        proofs: dict[str, Proven] = {}

        def update(replica: Replica) -> None:
            self._load(replica)
            dtype = self._model.dtype
            if adapted is None:
                proofs[replica.url] = prove(str(replica), replica, sent or source, version, dtype)
            else:
                proofs[replica.url] = prove_adapted(str(replica), replica, adapted, version, dtype)

        self._or_lose(update, on_lost, self.ready)
        until = time.monotonic() + 2 * self._service.deadline
        while not proofs:
            # all servers were lost during the learner's updates: wait for one to come back
            if self.given_up or time.monotonic() > until:
                raise EngineError(self.why_none_is_left())
            time.sleep(POLL_INTERVAL)
            self._or_lose(update, on_lost, [replica for replica in self.replicas if replica.healthy])
        self._proven = next(iter(proofs.values()))
        return size

    @property
    def proven(self) -> Proven:
        assert self._proven is not None
        return self._proven

    def lose(self, replica: Replica, reason: str) -> None:
        """Restarts a lost server in the background, unless it was lost too often."""
        replica.ready, replica.reason, replica.base = False, reason, None
        replica.failures += 1
        self.lost += 1
        self._warn(f"{reason}: its samples go to {len(self.ready)} other servers; {self._next(replica)}")
        if replica.failures <= MAX_FAILURES and not self._closed:
            threading.Thread(target=self._restart, args=(replica,), daemon=True).start()

    def _next(self, replica: Replica) -> str:
        if replica.failures > MAX_FAILURES:
            return f"lost {replica.failures} times in a row, it is not restarted"
        action = "waited for" if replica.arguments is None else "restarted"
        return f"it is {action} (loss {replica.failures} in a row of at most {MAX_FAILURES + 1})"

    def _warn(self, text: str) -> None:
        if not self._closed:
            log.warning("%s", text)

    def retire(self) -> None:
        """Tells the transport that the learner will now change its weights."""
        self._transport.retire()

    def close(self) -> None:
        """Ends the servers that were started here, and waits until their processes have ended."""
        if not self._closed:
            self._closed = True
            self._in_parallel(Replica.end, self.replicas)
            for replica in self.replicas:
                self._transport.forget(replica)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, replica: Replica) -> None:
        replica.start()
        replica.wait_until_healthy(self._service.deadline)
        replica.digests([], 0)
        replica.ready = True

    def _restart(self, replica: Replica) -> None:
        """Restarts a server; it gets the current weights before it samples."""
        while replica.failures <= MAX_FAILURES and not self._closed:
            try:
                self._transport.forget(replica)
                replica.stop()
                replica.start()
                replica.wait_until_healthy(self._service.deadline)
                replica.healthy = True
                while not self._closed and not self._update_restarted(replica):
                    time.sleep(POLL_INTERVAL)
                replica.last_progress, replica.ready, replica.healthy = time.monotonic(), True, False
                self._warn(f"{replica} is back and has the current weights")
                break
            except (EngineError, ReplicaError, SyncError) as error:
                replica.reason = str(error)
                replica.failures += 1
                self._warn(f"{error}; {self._next(replica)}")
        if self._closed:
            replica.stop()

    def _update_restarted(self, replica: Replica) -> bool:
        """Sends it the last update's weights; False if there are none now, or newer ones by the end."""
        if replica.has_ended:
            raise ReplicaError(f"{replica} ended while it waited for weights: {replica.last_log_lines()}")
        version, proven = self._version, self._proven
        if proven is None or not self._load(replica):
            return False
        wrong = differing(proven.expected, replica.digests(list(proven.expected), version))
        if self._proven is not proven:
            return False
        if wrong:
            raise ReplicaError(f"{replica} was restarted and does not hold {wrong[0][0]} as it was sent")
        return True

    def _load(self, replica: Replica) -> bool:
        """Loads the weights of `self._version` into a server, an adapter's base weights only if they are new.

        Returns False if the transport has no weights to send now.
        """
        version, deadline = self._version, self._service.deadline
        adapts = self._model.lora_rank > 0
        if (not adapts or replica.base is not self._base) and not self._transport.send(replica, deadline):
            return False
        if adapts and ADAPTER_NAME not in replica.models():
            # registers the name by which samples ask for the adapter
            body = {"lora_name": ADAPTER_NAME, "lora_path": str(self._adapter), "load_inplace": False}
            replica.call("POST", "/v1/load_lora_adapter", body, timeout=deadline)
        if adapts:
            replica.worker("tandem_adapter", deadline, path=str(self._adapter))
            replica.base = self._base
        path = "/reset_prefix_cache?reset_running_requests=true"
        if not replica.call("POST", path, timeout=deadline)["success"]:
            raise SyncError(f"{replica} did not clear its prefix cache after a weight update")
        if self._model.image_format is not None:
            replica.call("POST", "/reset_encoder_cache", timeout=deadline)
        replica.call("POST", "/update_weight_version", {"new_version": str(version)}, timeout=deadline)
        return True

    def _transport_for(self, placed: Sequence[Place | None]) -> Transport:
        """The transport for all servers. Raises EngineError if they were started for different ones."""
        asked, ranks = self._service.transport, self._service.ranks
        methods: set[TransportMethod] = {
            method_of(replica, asked, ranks) if place is None else place.method
            for replica, place in zip(self.replicas, placed, strict=True)
        }
        if len(methods) > 1:
            raise EngineError(
                "the servers of rollout.vllm.urls were started for different transports "
                f"({', '.join(sorted(methods))}): start all with the same --weight-transfer-config"
            )
        (method,) = methods
        return self._transport if method == "file" else DeviceTransport(method, self._model.dtype)

    @property
    def _adapter(self) -> Path:
        return self.folder / "adapter"

    def _or_lose(
        self,
        action: Callable[[Replica], None],
        on_lost: Callable[[Replica, str], None],
        replicas: Sequence[Replica],
    ) -> None:
        """Runs `action` on all replicas in parallel; `on_lost` gets those that failed."""
        failed: list[tuple[Replica, str]] = []

        def attempt(replica: Replica) -> None:
            try:
                action(replica)
            except ReplicaError as error:
                failed.append((replica, str(error)))

        self._in_parallel(attempt, replicas)
        for replica, reason in failed:
            on_lost(replica, reason)

    def _in_parallel(self, action: Callable[[Replica], None], replicas: Sequence[Replica]) -> None:
        """Runs `action` on all replicas at once; raises the first error when all are done."""
        if replicas:
            with ThreadPoolExecutor(len(replicas)) as pool:
                for done in [pool.submit(action, replica) for replica in replicas]:
                    done.result()


def command_line(model: VLLMModel) -> list[str]:
    """Command-line arguments of a server that is started here."""
    words = ["--enable-scale-out", "--disable-uvicorn-access-log"]
    for name, value in model.engine_args().items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    return words
