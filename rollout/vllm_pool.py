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
from typing import Any

import safetensors
from torch import Tensor

from rlhf.rollout.engine import EngineError, SyncError, WeightSource
from rlhf.rollout.proof import Aliases, Proven, Sent, differing, digest, looked_at, prove
from rlhf.rollout.vllm import VLLMModel
from rlhf.rollout.vllm_adapter import NAME, in_parts, prove_parts, write_adapter
from rlhf.rollout.vllm_client import PATIENCE, Replica, ReplicaError
from rlhf.rollout.weight_file import WeightFile

# its annotations are too incomplete for a strict check
_safetensors: Any = safetensors
SHARED_MEMORY = Path("/dev/shm")
LOOK_EVERY = 0.5
MAX_FAILURES = 3
"""In a row; a server that is lost more often is given up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """`urls`: servers that run already; none: `replicas` are started here. `deadline`: seconds."""

    replicas: int = 1
    urls: tuple[str, ...] = ()
    deadline: float = 600.0


class Pool:
    """Raises EngineError when a server does not start, is not there, or lacks what is needed."""

    def __init__(self, model: VLLMModel, service: Service) -> None:
        self._model, self._service = model, service
        shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="tandem-vllm-", dir=shared))
        arguments = command_line(model)
        urls: list[str] = list(service.urls) or [""] * service.replicas
        sees = None if model.sight is None else model.sight.kind
        self.replicas = [Replica(url, None if url else arguments, self.folder, sees) for url in urls]
        self._version = 0
        self._base: WeightSource | None = None
        self._proven: Proven | None = None
        self._closed = False
        self.lost = 0
        """How often a server was."""
        try:
            self._everywhere(self._start, self.replicas)
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

        self._or_lost(tell, lost)

    def update(self, source: WeightSource, version: int, lost: Callable[[Replica, str], None]) -> int:
        """Bytes. Raises SyncError: a server does not hold what it was sent. A lost one is given it later."""
        self._version, self._proven = version, None
        parts = in_parts(source, self._model.lora_rank)
        base = source if parts is None else parts.base
        size, sent = 0, None
        if parts is None or base is not self._base:
            size, sent = self._write(base, version)
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

        self._or_lost(update, lost)
        if not proofs:
            raise EngineError(self.why_none_is_left())
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

    def close(self) -> None:
        """Ends the servers that were started here, and waits until they are gone."""
        if not self._closed:
            self._closed = True
            self._everywhere(Replica.end, self.replicas)
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
                replica.stop()
                replica.start()
                replica.wait_until_healthy(self._service.deadline)
                while not self._closed and not self._caught_up(replica):
                    time.sleep(LOOK_EVERY)
                replica.moved, replica.ready = time.monotonic(), True
                self._say(f"{replica} is back and has the weights of now")
                break
            except (EngineError, ReplicaError, SyncError) as error:
                replica.reason = str(error)
                replica.failures += 1
                self._say(f"{error}; {self._next(replica)}")
        if self._closed:
            replica.stop()

    def _caught_up(self, replica: Replica) -> bool:
        """Loads the file of the last update, unless there is a new one by then."""
        version, proven = self._version, self._proven
        if proven is None:
            return False
        self._load(replica)
        wrong = differing(proven.expected, replica.digests(list(proven.expected), version))
        if self._proven is not proven:
            return False
        if wrong:
            raise ReplicaError(f"{replica} came back and does not hold {wrong[0][0]} as it was sent")
        return True

    def _load(self, replica: Replica) -> None:
        """The file in shared memory, of version `self._version`; of an adapter's base only when it is new."""
        version, deadline = self._version, self._service.deadline
        adapts = self._model.lora_rank > 0
        if not adapts or replica.base is not self._base:
            replica.worker("tandem_load", deadline, path=str(self._weights))
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
        if self._model.sight is not None:
            replica.call("POST", "/reset_encoder_cache", timeout=deadline)
        replica.call("POST", "/update_weight_version", {"new_version": str(version)}, timeout=deadline)

    @property
    def _adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def _weights(self) -> Path:
        return self.folder / "weights.safetensors"

    def _write(self, source: WeightSource, version: int) -> tuple[int, Sent]:
        """Under the names of the Hugging Face layout, one weight at a time; bytes, and what was sent."""
        aliases, digests, dtype = Aliases(source), dict[str, str](), self._model.dtype
        written = self._weights.with_suffix(".new")
        with WeightFile(written, aliases.all) as file:
            for sent, tensor in source.named_tensors():
                weight = tensor.detach().to("cpu", dtype)
                file.add(sent, weight)
                digests |= dict.fromkeys(aliases.of(sent), digest(looked_at(weight, version)))
        written.replace(self._weights)

        def part(name: str) -> Tensor:
            with _safetensors.safe_open(self._weights, framework="pt") as saved:
                held = set(saved.keys())
                weight = saved.get_tensor(next(other for other in aliases.of(name) if other in held))
            return looked_at(weight, version)

        return file.bytes, Sent(digests, part)

    def _or_lost(self, action: Callable[[Replica], None], lost: Callable[[Replica, str], None]) -> None:
        failed: list[tuple[Replica, str]] = []

        def attempt(replica: Replica) -> None:
            try:
                action(replica)
            except ReplicaError as error:
                failed.append((replica, str(error)))

        self._everywhere(attempt, self.ready)
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
