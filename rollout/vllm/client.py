"""The client of one vLLM server: starts and ends it (or finds it at its URL), and sends its requests."""

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
from rlhf.rollout.vllm.images import KIND_VARIABLE
from rlhf.rollout.vllm.in_process import VERSIONS, decoded_part

POLL_INTERVAL, ANSWER_TIMEOUT = 0.5, 30.0
"""Seconds between two checks of a server that starts, and seconds to wait for a short answer."""
HOW_TO_START = (
    "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out --logprobs-mode processed_logprobs "
    "--max-logprobs -1 --generation-config vllm --worker-extension-cls rlhf.rollout.vllm.worker.HeldWeights"
)


class ReplicaError(Exception):
    """A server is gone, does not answer in time, or answers that it is broken."""


class Replica:
    """One vLLM server.

    `arguments` are those of vLLM's command line to start it with; None if it already runs at `url`.
    `image_model` is the type of a model that takes images (rollout/vllm/images.py). `gpu` is the server's GPU
    as CUDA_VISIBLE_DEVICES names it.
    """

    def __init__(
        self,
        url: str,
        arguments: Sequence[str] | None,
        folder: Path,
        image_model: str | None = None,
        gpu: str | None = None,
    ) -> None:
        self.arguments, self.folder, self.image_model, self.gpu = arguments, folder, image_model, gpu
        self.url = url.rstrip("/")
        self.ready = False
        self.healthy = False
        """Whether it was restarted and waits for weights."""
        self.reason = "it has not started yet"
        self.failures = 0
        self.base: WeightSource | None = None
        """The base weights it was given, if it has an adapter."""
        self.last_progress = time.monotonic()
        """When it last returned a sample, or was sent the first one while idle."""
        self._port: int | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._ended_for_good = False
        self._starting = threading.Lock()
        self._log = folder / "none.log"

    def __str__(self) -> str:
        return f"the vllm server at {self.url}"

    def start(self) -> None:
        """Starts it on a free port of this host, unless it is a server found by its URL.

        Raises ReplicaError if it was ended for good.
        """
        if self.arguments is None:
            return
        with self._starting:
            self._check_wanted()
            self._keeper = self._started(self.arguments)

    def _started(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        # keep the port at a restart: other ranks know the server by its URL
        self._port = port = self._port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = self.folder / f"{port}.log"
        environ = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            # run the worker in the engine core's process, without binding its threads to cores
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PYTHONPATH": f"{_root()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            KIND_VARIABLE: self.image_model or "",
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
                # no Ctrl-C from the terminal: it asks the trainer to stop, which ends its servers itself
                start_new_session=True,
            )

    def wait_until_healthy(self, seconds: float) -> None:
        """Raises ReplicaError if it ends or is not healthy in `seconds`, EngineError for another version."""
        deadline = time.monotonic() + seconds
        while True:
            self._check_wanted()
            if self.has_ended:
                raise ReplicaError(f"{self} ended while it started: {self.last_log_lines()}")
            try:
                self.call("GET", "/health", timeout=ANSWER_TIMEOUT)
                break
            except ReplicaError as error:
                if time.monotonic() > deadline:
                    raise ReplicaError(f"{self} was not healthy within {seconds:g} s: {error}") from error
            time.sleep(POLL_INTERVAL)
        version = str(self.call("GET", "/version", timeout=ANSWER_TIMEOUT)["version"])
        if not version.startswith(VERSIONS):
            raise EngineError(f"{self} is of version {version}; expected {', '.join(VERSIONS)}.*")

    def stop(self) -> None:
        """Ends a server that was started here, and waits until its processes have ended."""
        self.ready = self.healthy = False
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.send_signal(signal.SIGTERM)
            keeper.wait()

    def end(self) -> None:
        """As `stop`, and a thread that is restarting it can no longer start it."""
        with self._starting:
            self._ended_for_good = True
        self.stop()

    def _check_wanted(self) -> None:
        if self._ended_for_good:
            raise ReplicaError(f"{self} was ended for good")

    @property
    def has_ended(self) -> bool:
        """Whether it was ended for good, or was started here and its process has ended."""
        keeper = self._keeper
        return self._ended_for_good or (keeper is not None and keeper.poll() is not None)

    def last_log_lines(self) -> str:
        """The last lines of its log with errors (or the last lines), to explain why it ended."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        errors = [line.strip() for line in lines if "Error" in line] or lines[-3:]
        return " | ".join(errors[-3:]) or "its log is empty"

    def call(self, method: str, path: str, body: Any = None, *, timeout: float) -> Any:
        """The answer, JSON or text. Raises ReplicaError if it fails, EngineError for a refused request."""
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
            raise EngineError(f"{self} refuses {path} ({status}): {HOW_TO_START}")
        if 400 <= status < 500:
            raise EngineError(f"{self} refuses a request to {path} ({status}): {text[:500]}")
        if status >= 500:
            raise ReplicaError(f"{self} failed ({status}): {text[:500]}")
        return json.loads(text) if kind == "application/json" and text else text or None

    def models(self) -> set[str]:
        """Names that requests may ask for: the model and its adapters."""
        return {model["id"] for model in self.call("GET", "/v1/models", timeout=ANSWER_TIMEOUT)["data"]}

    def worker(self, method: str, timeout: float, **kwargs: Any) -> Any:
        """Calls a method of `HeldWeights` in the server's worker."""
        body = {"method": method, "kwargs": kwargs}
        (answer,) = self.call("POST", "/collective_rpc", body, timeout=timeout)["results"]
        return answer

    def digests(self, names: Sequence[str], version: int) -> Mapping[str, Mapping[str, str]]:
        return self.worker("tandem_digests", 10 * ANSWER_TIMEOUT, names=list(names), version=version)

    def part(self, name: str, copy: str, version: int) -> Tensor:
        answer = self.worker("tandem_part", 10 * ANSWER_TIMEOUT, name=name, copy=copy, version=version)
        return decoded_part(answer)


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as found:
        found.bind((address, 0))
        return found.getsockname()[1]


def _root() -> Path:
    """The folder from which `rlhf` is imported, for the PYTHONPATH of the server."""
    return Path(__file__).absolute().parents[3]
