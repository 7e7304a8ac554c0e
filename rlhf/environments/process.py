"""The trainer's side of one process of environments: sends requests, hears answers, waits for neither."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from rlhf.environments.spec import EnvironmentSpec
from rlhf.rewards.workers.kept import KeeperProcess, KeptProcess

SERVE = "rlhf.environments.worker:serve"
SERVE_TEMPLATE = "rlhf.environments.forking:serve"
SERVE_ONE = "rlhf.environments.forking:serve_one"
UNLIMITED = 1 << 30
"""Processes below a template, and their memory in GiB: those of an episode have limits of their own."""
FORK_SECONDS = 60.0
"""Time limit for a template to fork; normally it takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a process says of an environment when it has loaded it."""

    name: str
    schemas: list[Mapping[str, Any]]
    by_function: Mapping[str, Any]
    requires: list[str]
    gives_rewards: bool


def request(call: int, do: str, episode: int, arguments: Mapping[str, Any] | None = None) -> bytes:
    """What a process is asked, as it reads it. Raises what pickle raises."""
    return pickle.dumps((call, do, episode, arguments or {}))


class EnvironmentProcess(KeptProcess):
    """A process that holds instances of environments. One thread waits for it; any may `post` and `wake`."""

    serve = SERVE
    longest_tail = 1 << 15
    """The stacks of many threads are long."""

    def __init__(self, spec: EnvironmentSpec, log: Callable[[str], None]) -> None:
        self._outgoing = b""
        self._lock = threading.Lock()
        self._alarm = -1
        super().__init__(spec, log, self.serve, spec)
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for poll in (self._both, self._answers):
            poll.register(self._alarm, select.POLLIN)

    def ready(self, who: str) -> list[Description]:
        """Waits until the environments are loaded. Raises StartError, with the reason, which names `who`."""
        return [Description(**fields) for fields in self.first_answer(who)["ready"]]

    def post(self, request: bytes) -> None:
        """Queues a request; `answers` sends it."""
        with self._lock:
            self._outgoing += request
        self.wake()

    def wake(self) -> None:
        """Has `answers` return."""
        with self._lock:
            if self._alarm >= 0:
                os.eventfd_write(self._alarm, 1)

    def answers(self, until: float) -> Iterator[dict[str, Any]]:
        """Sends what is queued, waits, and yields the answers that have come. Raises WorkerLost.

        It waits until something has come, or `wake` is called, or `until` (monotonic seconds).
        """
        self._send_some()
        ready = self.wait(until - time.monotonic())
        if self._alarm in ready:
            os.eventfd_read(self._alarm)
        self.hear(ready)
        while self.has_answer:
            yield self.take()

    def _send_some(self) -> None:
        """Sends as much as the process reads at once: a process that is stopped must not stop the trainer."""
        with self._lock:
            try:
                while self._outgoing:
                    sent = self._data.send(self._outgoing[: 1 << 20], socket.MSG_DONTWAIT)
                    self._outgoing = self._outgoing[sent:]
            except BlockingIOError:
                pass
            except OSError:
                # the process has ended, which is heard next
                self._outgoing = b""
            events = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
        for poll in (self._both, self._answers):
            poll.modify(self._data, events)

    def end(self) -> None:
        super().end()
        with self._lock:
            if self._alarm >= 0:
                os.close(self._alarm)
                self._alarm = -1


class Template(KeptProcess):
    """A process that has loaded the environments and is forked for each episode."""

    def __init__(self, spec: EnvironmentSpec, log: Callable[[str], None]) -> None:
        self._lock = threading.Lock()
        unlimited = replace(spec, processes=UNLIMITED, memory_gib=float(UNLIMITED))
        super().__init__(unlimited, log, SERVE_TEMPLATE, spec)

    def ready(self, who: str) -> list[Description]:
        """Waits until the environments are loaded. Raises StartError, with the reason, which names `who`."""
        return [Description(**fields) for fields in self.first_answer(who)["ready"]]

    def fork(self, settings: Mapping[str, Any]) -> ForkedKeeper:
        """Has it fork a keeper. Raises WorkerLost when it is gone."""
        with self._lock:
            descriptors = [*settings["passed"], settings["line"]]
            # that it has ended is heard next
            with suppress(OSError):
                socket.send_fds(self._data, [json.dumps(settings).encode()], descriptors)
            return ForkedKeeper(int(self.receive(time.monotonic() + FORK_SECONDS)["forked"]))


class ForkedKeeper:
    """A keeper that is no child of the trainer."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        """Waits until it has ended. Raises TimeoutExpired."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("keeper", timeout or 0.0)
        os.close(self._descriptor)

    def kill(self) -> None:
        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


class ForkedProcess(EnvironmentProcess):
    """The process of one episode."""

    serve = SERVE_ONE

    def __init__(self, spec: EnvironmentSpec, log: Callable[[str], None], template: Template) -> None:
        self._template = template
        super().__init__(spec, log)

    def ready(self, who: str) -> list[Description]:
        self.first_answer(who, FORK_SECONDS)
        return []

    def start_keeper(self, settings: Mapping[str, Any]) -> KeeperProcess:
        return self._template.fork(settings)
