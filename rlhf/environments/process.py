"""The trainer's side of one process of environments: sends requests, hears answers, waits for neither."""

from __future__ import annotations

import os
import pickle
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.environments.spec import EnvironmentSpec
from rlhf.rewards.workers.kept import KeptProcess

SERVE = "rlhf.environments.worker:serve"


@dataclass(frozen=True, slots=True)
class Description:
    """What a process says of an environment when it has loaded it."""

    name: str
    schemas: list[Mapping[str, Any]]
    by_function: Mapping[str, Any]
    requires: list[str]
    gives_rewards: bool


class EnvironmentProcess(KeptProcess):
    """A process that holds instances of environments. One thread waits for it; any may `post` and `wake`."""

    def __init__(self, spec: EnvironmentSpec, log: Callable[[str], None]) -> None:
        self._outgoing = b""
        self._lock = threading.Lock()
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        super().__init__(spec, log, SERVE, spec)
        for poll in (self._both, self._answers):
            poll.register(self._alarm, select.POLLIN)

    def ready(self, who: str) -> list[Description]:
        """Waits until the environments are loaded. Raises StartError, with the reason, which names `who`."""
        return [Description(**fields) for fields in self.first_answer(who)["ready"]]

    def post(self, call: int, do: str, episode: int, arguments: Mapping[str, Any]) -> None:
        """Queues a request; `answers` sends it."""
        request = pickle.dumps((call, do, episode, arguments))
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
