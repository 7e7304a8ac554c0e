"""The trainer's side of one worker process: starts it, sends calls, holds deadlines, says why it ended."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

from rlhf.plugins import absolute
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.signature import Signature
from rlhf.rewards.workers.environment import environment, hidden
from rlhf.rewards.workers.keeper import OVER_MEMORY, SLOW
from rlhf.rewards.workers.progress import Progress

KEEPER = Path(__file__).with_name("keeper.py")
START_SECONDS = 300.0
"""Time limit for a worker to import its function and construct its object; normally it takes far less."""
END_SECONDS = 30.0
"""Time limit for a keeper to kill its process tree; normally it takes milliseconds."""
LONGEST_ANSWER = 1 << 24
"""Bytes of the answer to one call; a longer one is treated as an error."""


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


class WorkerProcess:
    """A keeper and the worker below it; alive until `end`, or until a method raises WorkerLost."""

    def __init__(self, name: str, spec: RewardSpec, log: Callable[[str], None]) -> None:
        # the path must be absolute, because the worker runs in a folder of its own
        spec = replace(spec, path=absolute(spec.path))
        self.name, self.spec, self._log = name, spec, log
        self._data, workers_data = socket.socketpair()
        self._line, keepers_line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._progress = Progress()
        self._job = 0
        self._unread = b""
        self._both, self._answers = select.poll(), select.poll()
        for poll in (self._both, self._answers):
            poll.register(self._data, select.POLLIN)
        self._both.register(self._line, select.POLLIN)
        self._ended: str | None = None
        self.has_answered = False
        """Whether it has answered a call, so that what it holds may be of earlier calls."""
        self._tail = ""
        self._folder = Path(tempfile.gettempdir()) / f"reward-{uuid.uuid4().hex[:12]}"
        settings = {
            "data": workers_data.fileno(),
            "progress": self._progress.descriptor,
            "line": keepers_line.fileno(),
            "cwd": str(self._folder),
            "memory": int(spec.memory_gib * 2**30),
            "processes": spec.processes,
            "path": [entry or os.getcwd() for entry in sys.path],
        }
        with workers_data, keepers_line:
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", str(KEEPER), json.dumps(settings)],
                pass_fds=(workers_data.fileno(), keepers_line.fileno(), self._progress.descriptor),
                env=environment(spec),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._send((name, spec))

    def ready(self) -> Signature:
        """Waits until the function is loaded; returns its signature. Raises StartError, with the reason."""
        try:
            answer = self._receive(time.monotonic() + START_SECONDS)
        except WorkerLost as lost:
            how = f"was not ready within {START_SECONDS:g} s" if lost.kind == "timeout" else str(lost)
            who = f"{self.spec.kind} {self.name}"
            raise StartError(f"{who} cannot be loaded: {how}\n{lost.output}") from None
        if "ready" in answer:
            fields = answer["ready"]
            return Signature(
                accepts=None if fields["accepts"] is None else tuple(fields["accepts"]),
                requires=tuple(map(tuple, fields["requires"])),
                is_async=fields["is_async"],
                is_class=fields["is_class"],
                may_read=tuple(fields["may_read"]),
                compares=fields["compares"],
            )
        self.end()
        reason = answer["refused"] or _refusal(f"{self.spec.kind} {self.name}", answer)
        raise StartError(reason + hidden(str(answer), self.spec))

    def run(self, calls: Sequence[Mapping[str, Any]], *, is_async: bool) -> Iterator[tuple[int, Any]]:
        """Yields number and answer of each call as they arrive. Raises WorkerLost; the process is then gone.

        The deadline of a call is `timeout` seconds per sample after it began. For an async function the
        worker itself enforces these deadlines, and the trainer only intervenes a second later.
        """
        self._job += 1
        self._send((self._job, calls))
        seconds = [self.spec.timeout * len(arguments["completions"]) for arguments in calls]
        last = time.monotonic() + sum(seconds)
        missing = set(range(len(calls)))
        for number in range(len(calls)):

            def later(number: int = number) -> float:
                """Deadline of the call under way, perhaps a later one: answers are sent together."""
                call, since = self._progress.under_way(self._job) or (-1, 0.0)
                return min(last, since + seconds[call]) if number <= call < len(seconds) else 0.0

            if is_async:
                answer = self._receive(time.monotonic() + max(seconds) + 1.0)
            else:
                answer = self._receive(time.monotonic() + seconds[number], later)
            place = answer.get("call")
            if not isinstance(place, int) or place not in (missing if is_async else {number}):
                self._lose("died", f"it sent something that is not an answer: {answer!r:.200}")
            missing.discard(place)
            yield place, answer

    def interrupt(self) -> None:
        """Has the worker killed; may be called from another thread. Whoever waits for it gets WorkerLost."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Kills the worker and all it started, waits until they are gone, and logs what it printed last."""
        deadline = time.monotonic() + END_SECONDS
        with suppress(OSError):
            # the keeper then kills the worker; what the keeper sends can still be read
            self._line.shutdown(socket.SHUT_WR)
        self._wait_for_report(deadline)
        self._line.close()
        self._data.close()
        self._progress.close()
        try:
            self._keeper.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        # the keeper has removed the folder, unless it was killed itself
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: object) -> None:
        try:
            self._data.settimeout(END_SECONDS)
            self._data.sendall(pickle.dumps(message))
        except OSError:
            # the worker ended before it had read all; the next `_receive` finds out how
            return

    def _receive(self, deadline: float, later: Callable[[], float] = lambda: 0.0) -> dict[str, Any]:
        """The next answer. If it does not come in time, ends the process and raises WorkerLost.

        `later` is asked for a later deadline when the first one has passed.
        """
        while b"\n" not in self._unread:
            remaining = deadline - time.monotonic()
            ready = self._wait(remaining)
            if self._line.fileno() in ready:
                self._read_event()
            if self._data.fileno() in ready:
                self._read()
            elif self._ended is not None:
                self._lose("died", self._ended)
            elif remaining <= 0 and (deadline := later()) <= time.monotonic():
                self._kill_late()
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer: object = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._lose("died", f"it sent something that is not an answer: {line[:200]!r}")
        return cast(dict[str, Any], answer)

    def _wait(self, seconds: float) -> set[int]:
        poll = self._both if self._ended is None else self._answers
        return {descriptor for descriptor, _ in poll.poll(max(0.0, seconds) * 1000)}

    def _read(self) -> None:
        try:
            some = self._data.recv(1 << 16)
        except OSError:
            some = b""
        self._unread += some
        if not some:
            self._lose("died", self._how_it_ended())
        if len(self._unread) > LONGEST_ANSWER:
            self._lose("died", f"it sent an answer of more than {LONGEST_ANSWER >> 20} MiB")

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
        self._ended, self._tail = message["ended"], message["tail"]
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

    def _kill_late(self) -> NoReturn:
        """Asks the keeper to kill the worker, which missed a deadline; raises WorkerLost."""
        with suppress(OSError):
            self._line.send(b"d")
        reason = self._how_it_ended()
        self._lose("timeout" if reason == SLOW else "died", reason)

    def _lose(self, kind: str, message: str) -> NoReturn:
        """Ends the process and raises WorkerLost."""
        call, _ = self._progress.under_way(self._job) or (None, 0.0)
        self.end()
        raise WorkerLost(kind, message, self._tail, call)


def _refusal(who: str, answer: Mapping[str, Any]) -> str:
    lines = str(answer["traceback"]).splitlines()
    # the traceback without its heading and without the frames of the import system
    shown = [line for line in lines if not line.startswith(("Traceback", '  File "<frozen'))]
    return "\n".join([f"{who} cannot be loaded: {answer['raised']}", *shown])
