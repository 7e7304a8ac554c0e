"""The trainer's side of one process below a keeper: starts it, talks to it, and says why it ended.

Reward functions and judges (rlhf/rewards/workers/process.py) run in such processes, and environments
(rlhf/environments/process.py). What a subclass adds is what it sends, and the deadlines of its answers.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

from rlhf.rewards.workers.environment import NeedsVariables, environment, hidden
from rlhf.rewards.workers.keeper import OVER_MEMORY, SLOW

KEEPER = Path(__file__).with_name("keeper.py")
START_SECONDS = 300.0
"""Time limit for a worker to import its function and construct its object; normally it takes far less."""
END_SECONDS = 30.0
"""Time limit for a keeper to kill its process tree; normally it takes milliseconds."""
LONGEST_ANSWER = 1 << 24
"""Bytes of the answer to one call; a longer one is treated as an error."""
NO_ANSWER = "it sent something that is not an answer"


class WorkerLost(Exception):
    """The worker process is gone; the message says why.

    `kind`: "timeout" or "died". `output`: the last output of the worker. `call`: the number of the call that
    was under way; None if there may have been several, or if it is not known.
    """

    def __init__(self, kind: str, message: str, output: str, call: int | None) -> None:
        super().__init__(message)
        self.kind, self.output, self.call = kind, output, call

    @property
    def for_memory(self) -> bool:
        """Whether the process was killed for the memory that it held."""
        return OVER_MEMORY in str(self)


class StartError(ValueError):
    """The function cannot be loaded; the message includes the traceback of the user's code, if any."""


@runtime_checkable
class Kept(NeedsVariables, Protocol):
    """What a kept process must know of what runs in it: the settings of a reward function, a judge, ..."""

    @property
    def memory_gib(self) -> float:
        """Most memory of the process and those that it starts, in GiB."""
        ...

    @property
    def processes(self) -> int:
        """Most processes, itself and those that it starts."""
        ...


@runtime_checkable
class KeeperProcess(Protocol):
    """The keeper as the trainer sees it; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> Any:
        """Waits until it has ended. Raises TimeoutExpired of subprocess."""
        ...

    def kill(self) -> None: ...


class KeptProcess:
    """A keeper and the process below it; alive until `end`, or until a method raises WorkerLost."""

    longest_tail = 4000
    """Characters of the last output that WorkerLost has."""

    def __init__(
        self,
        spec: Kept,
        log: Callable[[str], None],
        serve: str,
        first: object,
        descriptors: Sequence[int] = (),
    ) -> None:
        """The process calls `serve`, "module:function", with its socket, `descriptors` and its own folder.

        The first message that it reads is `first`. `log` gets what it prints.
        """
        self._kept, self._log = spec, log
        self._data, workers_data = socket.socketpair()
        self._line, keepers_line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._unread = b""
        self._both, self._answers = select.poll(), select.poll()
        for poll in (self._both, self._answers):
            poll.register(self._data, select.POLLIN)
        self._both.register(self._line, select.POLLIN)
        self._ended: str | None = None
        self._tail = ""
        self._folder = Path(tempfile.gettempdir()) / f"{spec.kind.split()[0]}-{uuid.uuid4().hex[:12]}"
        passed = (workers_data.fileno(), *descriptors)
        settings = {
            "serve": serve,
            "passed": passed,
            "line": keepers_line.fileno(),
            "cwd": str(self._folder),
            "memory": int(spec.memory_gib * 2**30),
            "processes": spec.processes,
            "path": [entry or os.getcwd() for entry in sys.path],
        }
        try:
            with workers_data, keepers_line:
                self._keeper = self.start_keeper(settings)
        except BaseException:
            self._data.close()
            self._line.close()
            raise
        self.send(first)

    def start_keeper(self, settings: Mapping[str, Any]) -> KeeperProcess:
        """Starts the keeper, which gets the descriptors in `settings`."""
        return subprocess.Popen(
            [sys.executable, "-P", str(KEEPER), json.dumps(settings)],
            pass_fds=(*settings["passed"], settings["line"]),
            env=environment(self._kept),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def under_way(self) -> int | None:
        """Number of the call that is under way, for WorkerLost; None: it is not known."""
        return None

    def first_answer(self, who: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Waits until what it runs is loaded. Raises StartError, with the reason, which names `who`."""
        try:
            answer = self.receive(time.monotonic() + seconds)
        except WorkerLost as lost:
            how = f"was not ready within {seconds:g} s" if lost.kind == "timeout" else str(lost)
            raise StartError(f"{who} cannot be loaded: {how}\n{lost.output}") from None
        if "ready" in answer:
            return answer
        self.end()
        raise StartError((answer["refused"] or _refusal(who, answer)) + hidden(str(answer), self._kept))

    def interrupt(self) -> None:
        """Has the worker killed; may be called from another thread. Whoever waits for it gets WorkerLost."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Kills the worker and all it started, waits until they are gone, and logs what it printed last."""
        if self._line.fileno() < 0:
            # it has been ended when it was lost
            return
        deadline = time.monotonic() + END_SECONDS
        with suppress(OSError):
            # the keeper then kills the worker; what the keeper sends can still be read
            self._line.shutdown(socket.SHUT_WR)
        self._wait_for_report(deadline)
        self._line.close()
        self._data.close()
        try:
            self._keeper.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        # the keeper has removed the folder, unless it was killed itself
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, message: object) -> None:
        """Sends a pickle. That the process has ended is found out by the next `receive`."""
        try:
            self._data.settimeout(END_SECONDS)
            self._data.sendall(pickle.dumps(message))
        except OSError:
            # the worker ended before it had read all
            return

    def receive(self, deadline: float, later: Callable[[], float] = lambda: 0.0) -> dict[str, Any]:
        """The next answer. If it does not come in time, ends the process and raises WorkerLost.

        `later` is asked for a later deadline when the first one has passed.
        """
        while not self.has_answer:
            remaining = deadline - time.monotonic()
            ready = self.wait(remaining)
            self.hear(ready)
            is_late = remaining <= 0 and self._data.fileno() not in ready
            if is_late and (deadline := later()) <= time.monotonic():
                self.kill_late()
        return self.take()

    def hear(self, ready: set[int]) -> None:
        """Reads from what is ready. Raises WorkerLost when the process has ended and said all."""
        if self._line.fileno() in ready:
            self._read_event()
        if self._data.fileno() in ready:
            self._read()
        elif self._ended is not None:
            self.lose("died", self._ended)

    @property
    def has_answer(self) -> bool:
        """Whether `take` has an answer to give."""
        return b"\n" in self._unread

    def take(self) -> dict[str, Any]:
        """The next of the answers that have been read. Raises WorkerLost if it is none."""
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer: object = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self.lose("died", f"{NO_ANSWER}: {line[:200]!r}")
        return cast(dict[str, Any], answer)

    def wait(self, seconds: float) -> set[int]:
        """Waits until something can be read; returns from which descriptors."""
        poll = self._both if self._ended is None else self._answers
        ready = poll.poll(max(0.0, seconds) * 1000)
        return {descriptor for descriptor, events in ready if events & ~select.POLLOUT}

    def _read(self) -> None:
        try:
            some = self._data.recv(1 << 16)
        except OSError:
            some = b""
        self._unread += some
        if not some:
            self.lose("died", self._how_it_ended())
        if len(self._unread) > LONGEST_ANSWER:
            self.lose("died", f"it sent an answer of more than {LONGEST_ANSWER >> 20} MiB")

    def _read_event(self) -> None:
        """Reads one message of the keeper: output of the worker, or the report of how it ended."""
        try:
            event = self._line.recv(1 << 18)
        except OSError:
            event = b""
        if not event:
            self._ended = "its supervisor process is gone"
            return
        message: dict[str, Any] = json.loads(event)
        if "output" in message:
            self._log(message["output"])
            return
        self._ended, self._tail = message["ended"], message["tail"][-self.longest_tail :]
        if message["dropped"]:
            self._log(f"\n[{message['dropped']} bytes of output are left out]\n")

    def _how_it_ended(self) -> str:
        return self._wait_for_report(time.monotonic() + END_SECONDS)

    def _wait_for_report(self, deadline: float) -> str:
        """Logs what the worker printed until the keeper reports how it ended; returns how."""
        while self._ended is None and (remaining := deadline - time.monotonic()) > 0:
            if self._line.fileno() in self._wait_for_line(remaining):
                self._read_event()
        self._ended = self._ended or "its supervisor process does not respond"
        return self._ended

    def _wait_for_line(self, seconds: float) -> set[int]:
        if self._line.fileno() < 0:
            return set()
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(seconds * 1000)}

    def kill_late(self) -> NoReturn:
        """Asks the keeper to kill the worker, which missed a deadline; raises WorkerLost."""
        with suppress(OSError):
            self._line.send(b"d")
        reason = self._how_it_ended()
        self.lose("timeout" if reason == SLOW else "died", reason)

    def lose(self, kind: str, message: str) -> NoReturn:
        """Ends the process and raises WorkerLost."""
        call = self.under_way()
        self.end()
        raise WorkerLost(kind, message, self._tail, call)


def _refusal(who: str, answer: Mapping[str, Any]) -> str:
    lines = str(answer["traceback"]).splitlines()
    # the traceback without its heading and without the frames of the import system
    shown = [line for line in lines if not line.startswith(("Traceback", '  File "<frozen'))]
    return "\n".join([f"{who} cannot be loaded: {answer['raised']}", *shown])
