"""The vLLM servers of a run: started, watched, given weights, and brought back when they are lost."""

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
from rlhf.rollout.vllm.adapter import NAME, in_parts, prove_parts, write_adapter
from rlhf.rollout.vllm.client import PATIENCE, Replica, ReplicaError
from rlhf.rollout.vllm.device_transport import DeviceTransport
from rlhf.rollout.vllm.in_process import VLLMModel
from rlhf.rollout.vllm.transport import Asked, FileTransport, Place, Transport, Way, places, way_of
from rlhf.rollout.weight_proof import Proven, differing, prove

SHARED_MEMORY = Path("/dev/shm")
LOOK_EVERY = 0.5
MAX_FAILURES = 3
"""In a row; a server that is lost more often is given up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """`urls`: servers that run already; none: `replicas` are started here. `deadline`: seconds.

    `transport`: how they are given weights, "auto" or one of `WAYS`. `ranks`: of the learner.
    """

    replicas: int = 1
    urls: tuple[str, ...] = ()
    deadline: float = 600.0
    transport: Asked = "auto"
    ranks: int = 1


class ServerPool:
    """Raises EngineError when a server does not start, is not there, or lacks what is needed."""

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
        sees = None if model.image_format is None else model.image_format.kind
        self.replicas = [
            Replica(url, None, self.folder)
            if place is None
            else Replica(url, [*arguments, *place.arguments], self.folder, sees, place.gpu)
            for url, place in found
        ]
        self._version = 0
        self._base: WeightSource | None = None
        self._proven: Proven | None = None
        self._closed = False
        self._transport: Transport = FileTransport(self.folder / "weights.safetensors", model.dtype)
        self.lost = 0
        """How often a server was."""
        try:
            self._everywhere(self._start, self.replicas)
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

    def tell_all(self, path: str, lost: Callable[[Replica, str], None]) -> None:
        """`lost` gets those that do not answer."""
        timeout = min(PATIENCE, self._service.deadline)

        def tell(replica: Replica) -> None:
            replica.call("POST", path, timeout=timeout)

        self._or_lost(tell, lost, self.ready)

    def update(self, source: WeightSource, version: int, lost: Callable[[Replica, str], None]) -> int:
        """Bytes. Raises SyncError: a server does not hold what it was sent. A lost one is given it later."""
        self._version, self._proven = version, None
        parts = in_parts(source, self._model.lora_rank)
        base = source if parts is None else parts.base
        size, sent = 0, None
        if parts is None or base is not self._base or not self._transport.published:
            size, sent = self._transport.publish(base, version)
            self._base = base
        if parts is not None:
            size += write_adapter(self._adapter, parts.adapter, self._model.dtype)
        proofs: dict[str, Proven] = {}

        def update(replica: Replica) -> None:
            self._load(replica)
            dtype = self._model.dtype
            if parts is None:
                proofs[replica.url] = prove(str(replica), replica, sent or source, version, dtype)
            else:
                proofs[replica.url] = prove_parts(str(replica), replica, parts, version, dtype)

        self._or_lost(update, lost, self.ready)
        until = time.monotonic() + 2 * self._service.deadline
        while not proofs:
            # all were lost while the learner learned
            if self.given_up or time.monotonic() > until:
                raise EngineError(self.why_none_is_left())
            time.sleep(LOOK_EVERY)
            self._or_lost(update, lost, [replica for replica in self.replicas if replica.healthy])
        self._proven = next(iter(proofs.values()))
        return size

    @property
    def proven(self) -> Proven:
        assert self._proven is not None
        return self._proven

    def lose(self, replica: Replica, reason: str) -> None:
        """It is brought back, unless that was tried too often."""
        replica.ready, replica.reason, replica.base = False, reason, None
        replica.failures += 1
        self.lost += 1
        self._say(f"{reason}: its samples are asked of {len(self.ready)} others; {self._next(replica)}")
        if replica.failures <= MAX_FAILURES and not self._closed:
            threading.Thread(target=self._bring_back, args=(replica,), daemon=True).start()

    def _next(self, replica: Replica) -> str:
        if replica.failures > MAX_FAILURES:
            return f"lost {replica.failures} times in a row, it is given up"
        return f"it is brought back (loss {replica.failures} in a row of {MAX_FAILURES + 1} at most)"

    def _say(self, text: str) -> None:
        if not self._closed:
            log.warning("%s", text)

    def retire(self) -> None:
        """The learner will change its weights."""
        self._transport.retire()

    def close(self) -> None:
        """Ends the servers that were started here, and waits until they are gone."""
        if not self._closed:
            self._closed = True
            self._everywhere(Replica.end, self.replicas)
            for replica in self.replicas:
                self._transport.forget(replica)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, replica: Replica) -> None:
        replica.start()
        replica.wait_until_healthy(self._service.deadline)
        replica.digests([], 0)
        replica.ready = True

    def _bring_back(self, replica: Replica) -> None:
        """A server that comes back has the weights of now before it samples."""
        while replica.failures <= MAX_FAILURES and not self._closed:
            try:
                self._transport.forget(replica)
                replica.stop()
                replica.start()
                replica.wait_until_healthy(self._service.deadline)
                replica.healthy = True
                while not self._closed and not self._caught_up(replica):
                    time.sleep(LOOK_EVERY)
                replica.moved, replica.ready, replica.healthy = time.monotonic(), True, False
                self._say(f"{replica} is back and has the weights of now")
                break
            except (EngineError, ReplicaError, SyncError) as error:
                replica.reason = str(error)
                replica.failures += 1
                self._say(f"{error}; {self._next(replica)}")
        if self._closed:
            replica.stop()

    def _caught_up(self, replica: Replica) -> bool:
        """Gives it the weights of the last update, unless there are none to give, or new ones by then."""
        if replica.has_ended:
            raise ReplicaError(f"{replica} ended while it waited for weights: {replica.last_words()}")
        version, proven = self._version, self._proven
        if proven is None or not self._load(replica):
            return False
        wrong = differing(proven.expected, replica.digests(list(proven.expected), version))
        if self._proven is not proven:
            return False
        if wrong:
            raise ReplicaError(f"{replica} came back and does not hold {wrong[0][0]} as it was sent")
        return True

    def _load(self, replica: Replica) -> bool:
        """The weights of version `self._version`; of an adapter's base only when it is new. False: there are
        none now.
        """
        version, deadline = self._version, self._service.deadline
        adapts = self._model.lora_rank > 0
        if (not adapts or replica.base is not self._base) and not self._transport.send(replica, deadline):
            return False
        if adapts and NAME not in replica.models():
            # samples ask for it by its name
            body = {"lora_name": NAME, "lora_path": str(self._adapter), "load_inplace": False}
            replica.call("POST", "/v1/load_lora_adapter", body, timeout=deadline)
        if adapts:
            replica.worker("tandem_adapter", deadline, path=str(self._adapter))
            replica.base = self._base
        path = "/reset_prefix_cache?reset_running_requests=true"
        if not replica.call("POST", path, timeout=deadline)["success"]:
            raise SyncError(f"{replica} did not give up its prefix cache after a weight update")
        if self._model.image_format is not None:
            replica.call("POST", "/reset_encoder_cache", timeout=deadline)
        replica.call("POST", "/update_weight_version", {"new_version": str(version)}, timeout=deadline)
        return True

    def _transport_for(self, placed: Sequence[Place | None]) -> Transport:
        """One for all servers. Raises EngineError: they cannot be given weights alike."""
        asked, ranks = self._service.transport, self._service.ranks
        ways: set[Way] = {
            way_of(replica, asked, ranks) if place is None else place.way
            for replica, place in zip(self.replicas, placed, strict=True)
        }
        if len(ways) > 1:
            raise EngineError(
                f"the servers of rollout.vllm.urls were started for {' and '.join(sorted(ways))}: start all "
                "with the same --weight-transfer-config"
            )
        (way,) = ways
        return self._transport if way == "file" else DeviceTransport(way, self._model.dtype)

    @property
    def _adapter(self) -> Path:
        return self.folder / "adapter"

    def _or_lost(
        self,
        action: Callable[[Replica], None],
        lost: Callable[[Replica, str], None],
        replicas: Sequence[Replica],
    ) -> None:
        failed: list[tuple[Replica, str]] = []

        def attempt(replica: Replica) -> None:
            try:
                action(replica)
            except ReplicaError as error:
                failed.append((replica, str(error)))

        self._everywhere(attempt, replicas)
        for replica, reason in failed:
            lost(replica, reason)

    def _everywhere(self, action: Callable[[Replica], None], replicas: Sequence[Replica]) -> None:
        """At once; the first error is raised when all are through."""
        if replicas:
            with ThreadPoolExecutor(len(replicas)) as pool:
                for done in [pool.submit(action, replica) for replica in replicas]:
                    done.result()


def command_line(model: VLLMModel) -> list[str]:
    """Arguments of a server that is started here."""
    words = ["--enable-scale-out", "--disable-uvicorn-access-log"]
    for name, value in model.engine_args().items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    return words
