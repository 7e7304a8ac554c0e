"""The keeper: supervisor process of one worker, which limits and kills it with all that it started.

    trainer --line--> keeper --fork--> worker (a reward function, environments) --> whatever they start
    trainer <------------samples and scores------------> worker

The keeper runs no user code, so it is reliable where the worker is not. It adopts the orphans of all
processes below it (PR_SET_CHILD_SUBREAPER). So no process that user code starts can escape, neither
by opening a session of its own nor by outliving its parent. The keeper kills the whole tree, by SIGKILL, when
the trainer asks, when the trainer has ended for whatever reason, when the worker ends, and when the tree has
too many processes or uses too much memory. Then the keeper ends: it supervises only one worker.

This file is run as a script with one argument, its settings as JSON. It imports only a few modules of the
standard library, because the time these take is part of the time in which a worker starts.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK = 0.05
"""Seconds between two checks of the process tree."""
DUMP_SECONDS = 1.0
"""Seconds that a worker has to write its stack before it is killed."""
OUTPUT_LIMIT = 1 << 18
"""Bytes of a worker's output that are passed on at most; the rest is counted and dropped."""
PIECE = 1 << 14
"""Bytes of output that are read, or passed on, at once."""
REPORT_SECONDS = 10.0
"""Seconds in which the trainer must read the final report; it is normally waiting for it."""
TAIL = 1 << 15
"""Bytes of the worker's last output that the final report holds."""
SLOW = "it was too slow"
"""Reason reported when the trainer asks to kill a worker that is within its other limits."""
OVER_MEMORY = "it and its processes held"
"""How the reason begins for a worker that is killed for its memory."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    supervise(json.loads(sys.argv[1]))


def supervise(settings: dict[str, Any]) -> None:
    """Forks the worker and supervises it until one of the two has to end; then kills the whole tree."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    output, workers_output = os.pipe()
    folder: str = settings["cwd"]
    os.mkdir(folder, 0o700)
    worker = os.fork()
    if worker == 0:
        status = 1
        try:
            _become_worker(settings, libc, workers_output)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(workers_output)
    for descriptor in settings["passed"]:
        os.close(descriptor)
    keeper = Keeper(worker, settings, output)
    ended = None
    try:
        ended = keeper.watch()
    finally:
        _end(worker)
        shutil.rmtree(folder, ignore_errors=True)
    keeper.report(ended)


def _become_worker(settings: dict[str, Any], libc: ctypes.CDLL, output: int) -> None:
    """In the forked child: closes the keeper's files, sets limits, and serves what the settings name."""
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.close(settings["line"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory: int = settings["memory"]
    # limits private writable memory; RLIMIT_AS would also count what libraries map or only reserve
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sys.path[:] = settings["path"]
    sys.argv[:] = ["worker"]
    module, _, function = str(settings["serve"]).partition(":")
    serve = getattr(import_module(module), function)
    serve(*settings["passed"], settings["cwd"])


class Keeper:
    """Supervises one worker: relays its output, checks its limits, reports how it ended."""

    def __init__(self, worker: int, settings: dict[str, Any], output: int) -> None:
        self.worker, self.output = worker, output
        self.line: int = settings["line"]
        self.memory: int = settings["memory"]
        self.processes: int = settings["processes"]
        self.trainer = os.getppid()
        self.taken = self.dropped = 0
        self.tail = self.waiting = b""
        """The last output of the worker; the output that is not passed on yet."""
        self.is_connected = True
        """Whether the trainer can still be reached."""
        os.set_blocking(output, False)
        os.set_blocking(self.line, False)

    def watch(self) -> str | None:
        """Returns when the worker has ended or must end: the reason, None if the trainer needs none."""
        poll = select.poll()
        poll.register(self.line, select.POLLIN)
        poll.register(self.output, select.POLLIN)
        next_look = 0.0
        while True:
            ready = dict(poll.poll(TICK * 1000))
            if self.output in ready and not self._read_output():
                poll.unregister(self.output)
            self._pass_on()
            if self.line in ready:
                if self._read_command() != b"d":
                    return None
                if excess := self._excess():
                    return excess
                self._dump_stack()
                return SLOW
            if (status := self._reap()) is not None:
                return _how(status)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + TICK
                if os.getppid() != self.trainer:
                    return None
                if excess := self._excess():
                    return excess

    def _read_command(self) -> bytes:
        """The trainer's command: `d` for a missed deadline, nothing when it has closed the line.

        A line that is closed while it holds unread messages raises ConnectionResetError.
        """
        try:
            return os.read(self.line, 1)
        except ConnectionResetError:
            return b""

    def report(self, ended: str | None) -> None:
        """Passes on the rest of the output of the worker, which has ended, and then how it ended."""
        for _ in range(64):
            if not select.select([self.output], [], [], 0)[0] or not self._read_output():
                break
        poll = select.poll()
        poll.register(self.line, select.POLLOUT)
        deadline = time.monotonic() + REPORT_SECONDS
        reported = ended is None
        while self.is_connected and (self.waiting or not reported) and time.monotonic() < deadline:
            self._pass_on(unfinished=True)
            if not self.waiting and not reported:
                tail = self.tail.decode(errors="replace")
                reported = self._send_event(ended=ended, tail=tail, dropped=self.dropped)
            if self.waiting or not reported:
                poll.poll(TICK * 1000)

    def _reap(self) -> int | None:
        """Waits for the processes that have ended; returns the status of the worker if it is one of them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid == self.worker:
                return status

    def _excess(self) -> str | None:
        """Which limit the process tree exceeds, None if it keeps to all."""
        pids = list(descendants(os.getpid()))
        if len(pids) > self.processes:
            return f"it had {len(pids)} processes, more than the {self.processes} allowed"
        # resident sizes count shared pages once per process; the exact size takes longer to read
        if sum(map(_resident, pids)) > self.memory and (used := sum(map(_proportional, pids))) > self.memory:
            return (
                f"{OVER_MEMORY} {used / 2**30:.1f} GiB, more than the {self.memory / 2**30:.1f} GiB allowed"
            )
        return None

    def _dump_stack(self) -> None:
        """Makes the worker write its stack (faulthandler needs no interpreter lock for it) and reads it."""
        try:
            os.kill(self.worker, signal.SIGUSR2)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + DUMP_SECONDS
        while (remaining := deadline - time.monotonic()) > 0:
            if select.select([self.output], [], [], remaining)[0] and not self._read_output():
                return
            if b"most recent call first" in self.tail:
                time.sleep(0.01)
                self._read_output()
                return

    def _read_output(self) -> bool:
        """Reads some output; what exceeds OUTPUT_LIMIT is dropped. False at the end of the output."""
        try:
            chunk = os.read(self.output, PIECE)
        except BlockingIOError:
            return True
        self.tail = (self.tail + chunk)[-TAIL:]
        some = chunk[: max(0, OUTPUT_LIMIT - self.taken)]
        self.taken += len(some)
        self.dropped += len(chunk) - len(some)
        self.waiting += some
        return bool(chunk)

    def _pass_on(self, *, unfinished: bool = False) -> None:
        """Passes on whole lines, and an incomplete one if it is long or if it is the last (`unfinished`).

        Output that the trainer does not read at the moment is kept: the keeper must never block on the
        trainer.
        """
        while self.waiting:
            length = self.waiting.rfind(b"\n", 0, PIECE) + 1
            if length == 0 and (unfinished or len(self.waiting) >= PIECE):
                length = min(len(self.waiting), PIECE)
            if length == 0 or not self._send_event(output=self.waiting[:length].decode(errors="replace")):
                return
            self.waiting = self.waiting[length:]

    def _send_event(self, **event: Any) -> bool:
        """Sends an event to the trainer. False when the trainer is gone or does not read at the moment."""
        try:
            os.write(self.line, json.dumps(event).encode())
        except BlockingIOError:
            return False
        except OSError:
            self.is_connected, self.waiting = False, b""
            return False
        return True


def _how(status: int) -> str:
    """How a process ended, as a clause of an error message."""
    if not os.WIFSIGNALED(status):
        return f"it exited with status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    known = {s.value: s.name for s in signal.Signals}
    return f"it was killed by {known.get(number, f'signal {number}')}"


def _end(worker: int) -> None:
    """Kills all processes below this one: whole groups at once, so that a fork bomb cannot outrun it."""
    _kill(worker, group=True)
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        pids = list(descendants(os.getpid()))
        for pid in pids:
            _kill(pid, group=True)
            _kill(pid, group=False)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if not pids:
            time.sleep(0.001)


def _kill(pid: int, *, group: bool) -> None:
    """Kills a process, or its whole group unless that is the keeper's own group."""
    try:
        if not group:
            os.kill(pid, signal.SIGKILL)
        elif (leader := os.getpgid(pid)) != os.getpgrp():
            os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def descendants(pid: int) -> Iterator[int]:
    """All processes below `pid`: from the kernel's lists of children or, without them, from all parents."""
    if not os.path.exists(f"/proc/{pid}/task/{pid}/children"):
        yield from _descendants_by_parent(pid)
        return
    below = [pid]
    while below:
        pid = below.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    children = [int(word) for word in file.read().split()]
                yield from children
                below += children
        except (FileNotFoundError, ProcessLookupError):
            continue


def _descendants_by_parent(pid: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(name))
    below = [pid]
    while below:
        for child in children.get(below.pop(), []):
            yield child
            below.append(child)


def _resident(pid: int) -> int:
    """Resident memory of a process in bytes; pages shared with other processes count fully."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _proportional(pid: int) -> int:
    """Resident memory of a process in bytes; shared pages count in proportion (PSS)."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


if __name__ == "__main__":
    main()
