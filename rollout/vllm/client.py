"""One vLLM server, as the engine sees it: started here and ended with us, or found at its address."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.rollout.engine import EngineError, WeightSource
from rlhf.rollout.vllm.images import MARK
from rlhf.rollout.vllm.in_process import VERSIONS, decoded_part

LOOK_EVERY, PATIENCE = 0.5, 30.0
"""Seconds: between two looks at a server that starts, and for an answer about its health."""
NEEDED = (
    "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out --logprobs-mode processed_logprobs "
    "--max-logprobs -1 --generation-config vllm --worker-extension-cls rlhf.rollout.vllm.worker.HeldWeights"
)


class ReplicaError(Exception):
    """A server is gone, does not answer in time, or answers that it is broken."""


class Replica:
    """`arguments`: to start it with, of vLLM's command line; None: it runs at `url` already. `sees`: kind of
    its model, where that can see (rollout/vllm_pictures.py). `gpu`: for it, as CUDA_VISIBLE_DEVICES names it.
    """

    def __init__(
        self,
        url: str,
        arguments: Sequence[str] | None,
        folder: Path,
        sees: str | None = None,
        gpu: str | None = None,
    ) -> None:
        self.arguments, self.folder, self.sees, self.gpu = arguments, folder, sees, gpu
        self.url = url.rstrip("/")
        self.ready = False
        self.healthy = False
        """It came back, and waits for weights."""
        self.reason = "it has not started yet"
        self.failures = 0
        self.base: WeightSource | None = None
        """What the adapter it holds stands on."""
        self.moved = time.monotonic()
        """When it last gave a sample, or got the first it had to give."""
        self._port: int | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._over = False
        self._starting = threading.Lock()
        self._log = folder / "none.log"

    def __str__(self) -> str:
        return f"the vllm server at {self.url}"

    def start(self) -> None:
        """On a free port of this host; a server found by its address is left as it is.

        Raises ReplicaError: it was ended for good.
        """
        if self.arguments is None:
            return
        with self._starting:
            self._check_wanted()
            self._keeper = self._started(self.arguments)

    def _started(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        # the same whenever it is started again: other ranks know it by that
        self._port = port = self._port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = self.folder / f"{port}.log"
        environ = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            # the worker in the process of the engine core, its threads where the system puts them
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PYTHONPATH": f"{_root()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            MARK: self.sees or "",
        }
        if self.gpu is not None:
            environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environ.pop(name, None)
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "rlhf.rollout.vllm.keeper",
                    *(str(os.getpid()), str(self.folder)),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                # not the terminal's: Ctrl-C is a request to the trainer, which ends its servers itself
                start_new_session=True,
            )

    def wait_until_healthy(self, seconds: float) -> None:
        """Raises ReplicaError: it ended, or is not healthy within `seconds`; EngineError: another version."""
        deadline = time.monotonic() + seconds
        while True:
            self._check_wanted()
            if self.has_ended:
                raise ReplicaError(f"{self} ended while it started: {self.last_words()}")
            try:
                self.call("GET", "/health", timeout=PATIENCE)
                break
            except ReplicaError as error:
                if time.monotonic() > deadline:
                    raise ReplicaError(f"{self} was not healthy within {seconds:g} s: {error}") from error
            time.sleep(LOOK_EVERY)
        version = str(self.call("GET", "/version", timeout=PATIENCE)["version"])
        if not version.startswith(VERSIONS):
            raise EngineError(f"{self} is of version {version}; this adapter is for {', '.join(VERSIONS)}.*")

    def stop(self) -> None:
        """Ends a server that was started here, and waits until it is gone."""
        self.ready = self.healthy = False
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.send_signal(signal.SIGTERM)
            keeper.wait()

    def end(self) -> None:
        """As `stop`, and nobody who is bringing it back can start it again."""
        with self._starting:
            self._over = True
        self.stop()

    def _check_wanted(self) -> None:
        if self._over:
            raise ReplicaError(f"{self} is not wanted any more")

    @property
    def has_ended(self) -> bool:
        """Whether it was started here and is gone, or is not wanted any more."""
        keeper = self._keeper
        return self._over or (keeper is not None and keeper.poll() is not None)

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        told = [line.strip() for line in lines if "Error" in line] or lines[-3:]
        return " | ".join(told[-3:]) or "it said nothing"

    def call(self, method: str, path: str, body: Any = None, *, timeout: float) -> Any:
        """Its answer, JSON or text. Raises ReplicaError; EngineError when the request itself is refused."""
        address = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=timeout)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, text = response.status, response.read().decode(errors="replace")
            kind = response.headers.get_content_type()
        except (OSError, http.client.HTTPException) as error:
            raise ReplicaError(f"{self} does not answer: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if status in (403, 404):
            raise EngineError(f"{self} refuses {path} ({status}): {NEEDED}")
        if 400 <= status < 500:
            raise EngineError(f"{self} refuses a request to {path} ({status}): {text[:500]}")
        if status >= 500:
            raise ReplicaError(f"{self} is broken ({status}): {text[:500]}")
        return json.loads(text) if kind == "application/json" and text else text or None

    def models(self) -> set[str]:
        """What requests may ask for by name: the model and its adapters."""
        return {model["id"] for model in self.call("GET", "/v1/models", timeout=PATIENCE)["data"]}

    def worker(self, method: str, timeout: float, **kwargs: Any) -> Any:
        body = {"method": method, "kwargs": kwargs}
        (answer,) = self.call("POST", "/collective_rpc", body, timeout=timeout)["results"]
        return answer

    def digests(self, names: Sequence[str], version: int) -> Mapping[str, Mapping[str, str]]:
        return self.worker("tandem_digests", 10 * PATIENCE, names=list(names), version=version)

    def part(self, name: str, copy: str, version: int) -> Tensor:
        answer = self.worker("tandem_part", 10 * PATIENCE, name=name, copy=copy, version=version)
        return decoded_part(answer)


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as found:
        found.bind((address, 0))
        return found.getsockname()[1]


def _root() -> Path:
    """Where `rlhf` is imported from, for a process that is started elsewhere."""
    return Path(__file__).absolute().parents[3]
