"""The process between the trainer and one reward worker. It runs no code of a user's, so it can be relied on.

    trainer --line--> keeper --fork--> worker (the reward function) --> whatever the function starts
    trainer <------------samples and scores------------> worker

The keeper adopts the orphans of everything below it (PR_SET_CHILD_SUBREAPER), so nothing that a reward starts
escapes: neither by a session of its own nor by outliving its parent. It ends all of it, by SIGKILL, when the
trainer asks, when the trainer is gone however it went, when the worker ends, and when the tree has too many
processes or too much memory. Then it ends itself: a keeper has one worker in its life.

Run as a file with one argument, its settings as JSON; it imports the standard library alone, and of that
little, because a worker starts in what this takes.
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
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK = 0.05
"""Seconds between two looks at the tree."""
DUMP_SECONDS = 1.0
"""What a worker has to write its stack before it is killed."""
OUTPUT_LIMIT = 1 << 18
"""Bytes of a worker's output that are passed on; the rest is counted and dropped."""
PIECE = 1 << 14
"""Bytes of output that are read, and passed on, at once."""
REPORT_SECONDS = 10.0
"""What a trainer has to hear the last words of a worker; it listens already."""
TAIL = 4000
SLOW = "it was too slow"
"""Why the trainer has a worker killed, unless there is a better reason."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    output, its_output = os.pipe()
    folder: str = settings["cwd"]
    os.mkdir(folder, 0o700)
    worker = os.fork()
    if worker == 0:
        status = 1
        try:
            _become_worker(settings, libc, its_output)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(its_output)
    os.close(settings["data"])
    os.close(settings["progress"])
    keeper = Keeper(worker, settings, output)
    ended = None
    try:
        ended = keeper.watch()
    finally:
        _end(worker)
        shutil.rmtree(folder, ignore_errors=True)
    keeper.report(ended)


def _become_worker(settings: dict[str, Any], libc: ctypes.CDLL, output: int) -> None:
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
    # private writable memory: unlike RLIMIT_AS it does not count what libraries map and reserve
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sys.path[:] = settings["path"]
    sys.argv[:] = ["reward"]
    from rlhf.rewards.workers.worker import serve

    serve(settings["data"], settings["progress"], settings["cwd"])


class Keeper:
    """Watches one worker."""

    def __init__(self, worker: int, settings: dict[str, Any], output: int) -> None:
        self.worker, self.output = worker, output
        self.line: int = settings["line"]
        self.memory: int = settings["memory"]
        self.processes: int = settings["processes"]
        self.trainer = os.getppid()
        self.taken = self.dropped = 0
        self.tail = self.waiting = b""
        """What it wrote last; and what is not passed on yet."""
        self.is_heard = True
        os.set_blocking(output, False)
        os.set_blocking(self.line, False)

    def watch(self) -> str | None:
        """Returns when the worker has to end or has ended: why, None when the trainer needs no reason."""
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
                if self._told() != b"d":
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

    def _told(self) -> bytes:
        """What the trainer says; nothing when it has closed the line, maybe with words on it left unread."""
        try:
            return os.read(self.line, 1)
        except ConnectionResetError:
            return b""

    def report(self, ended: str | None) -> None:
        """The last that is said: the rest of what the worker wrote, which has ended, and how it ended."""
        for _ in range(64):
            if not select.select([self.output], [], [], 0)[0] or not self._read_output():
                break
        poll = select.poll()
        poll.register(self.line, select.POLLOUT)
        deadline = time.monotonic() + REPORT_SECONDS
        told = ended is None
        while self.is_heard and (self.waiting or not told) and time.monotonic() < deadline:
            self._pass_on(unfinished=True)
            if not self.waiting and not told:
                tail = self.tail.decode(errors="replace")
                told = self._tell(ended=ended, tail=tail, dropped=self.dropped)
            if self.waiting or not told:
                poll.poll(TICK * 1000)

    def _reap(self) -> int | None:
        """Collects the dead; the status of the worker if it is among them."""
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
        pids = list(descendants(os.getpid()))
        if len(pids) > self.processes:
            return f"it had {len(pids)} processes, more than the {self.processes} allowed"
        # pages that processes share count in each of them here; the exact sum takes longer to know
        if sum(map(_resident, pids)) > self.memory and (used := sum(map(_share, pids))) > self.memory:
            return (
                f"it and its processes held {used / 2**30:.1f} GiB, more than the "
                f"{self.memory / 2**30:.1f} GiB allowed"
            )
        return None

    def _dump_stack(self) -> None:
        """Has the worker write where it is; faulthandler does it without the interpreter's lock."""
        try:
            os.kill(self.worker, signal.SIGUSR2)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + DUMP_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.output], [], [], left)[0] and not self._read_output():
                return
            if b"most recent call first" in self.tail:
                time.sleep(0.01)
                self._read_output()
                return

    def _read_output(self) -> bool:
        """Takes output in up to the limit. False at its end."""
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
        """Passes whole lines on, and one without an end if it is long or nothing more is to come.

        What the trainer does not read at the moment waits here: nothing may wait for the trainer.
        """
        while self.waiting:
            length = self.waiting.rfind(b"\n", 0, PIECE) + 1
            if length == 0 and (unfinished or len(self.waiting) >= PIECE):
                length = min(len(self.waiting), PIECE)
            if length == 0 or not self._tell(output=self.waiting[:length].decode(errors="replace")):
                return
            self.waiting = self.waiting[length:]

    def _tell(self, **event: Any) -> bool:
        """False when the trainer is gone, or does not read at the moment."""
        try:
            os.write(self.line, json.dumps(event).encode())
        except BlockingIOError:
            return False
        except OSError:
            self.is_heard, self.waiting = False, b""
            return False
        return True


def _how(status: int) -> str:
    """How a process ended, for people."""
    if not os.WIFSIGNALED(status):
        return f"it exited with status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    known = {s.value: s.name for s in signal.Signals}
    return f"it was killed by {known.get(number, f'signal {number}')}"


def _end(worker: int) -> None:
    """Kills everything below this process. Whole groups at once, so that a fork bomb cannot outrun it."""
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
    """A group of the worker's tree only: a process that shares the keeper's own is killed by itself."""
    try:
        if not group:
            os.kill(pid, signal.SIGKILL)
        elif (leader := os.getpgid(pid)) != os.getpgrp():
            os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def descendants(pid: int) -> Iterator[int]:
    """Every process below `pid`, as the kernel lists them; of a kernel that does not, by all parents."""
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
    """Bytes of a process in memory, those it shares with others in full."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _share(pid: int) -> int:
    """Bytes of a process in memory, its part of those it shares with others."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


if __name__ == "__main__":
    main()
