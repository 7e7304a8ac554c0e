"""Watchdog: ends a rank that waits for a late, failed or dead one; its errors name that rank and its phase.

On every rank, a thread publishes once a second what the rank does (its phase, since when, whether it waits
for others) in the TCP store of the process group, and reads what the others have published. A second thread,
which never uses the network and so cannot hang, ends this process with an error that names the responsible
rank when

1. this rank has waited longer than `distributed.timeout`: responsible are the ranks that do not wait;
2. another rank has published nothing for that long, or for a minute: it is frozen or was killed;
3. another rank has reported an error, or its process has ended without one (which is known on the same
   machine, by process_state.py), and this process does not end by itself within `GRACE` seconds;
4. the store does not answer: the process that holds it was killed or is frozen.

A rank that dies closes its connections, so a collective with it fails at once; `explain` then tells which
rank it was and what it did last. Code that waits for other ranks without a collective calls
`raise_if_another_failed`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlhf.distributed.process_state import Process

# its annotations are too incomplete for a strict check
_dist: Any = dist
BEAT = 1.0
"""Seconds between two messages of a rank."""
LOST = 60.0
"""Seconds without a message after which a rank counts as frozen or killed, if the timeout is not shorter."""
GRACE = 10.0
"""Seconds that this process has to end by itself, with its own error, before the watchdog ends it."""
KILLED = "without an error of its own: it was killed, perhaps by the system because memory ran out"
EXIT = 3
"""Exit status of a rank that ends because of another rank."""


class RankError(RuntimeError):
    """Another rank has failed, died or frozen. The message names it and its phase."""


@dataclass(slots=True)
class RankState:
    """What is known of another rank. Times are by this rank's clock."""

    message: dict[str, Any]
    """The last message of the rank, see `Watchdog._publish`."""
    at: float
    """When that message came."""
    died: float | None = None
    """When its process was seen to have ended without having reported an error."""
    store_answered: bool = True
    """False: it may have reported an error, but its store cannot be read any more."""

    def process_ended(self) -> bool:
        return "process" in self.message and Process(*self.message["process"]).has_ended()


class Watchdog:
    """Watches the other ranks from this one, within its context. `timeout` in seconds."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.others = [r for r in range(size) if r != rank]
        start = {"phase": "start", "since": 0.0, "waits": False}
        self.states = {r: RankState(start, time.monotonic()) for r in self.others}
        self._phase, self._since, self._waits_since = "start", time.monotonic(), None
        self._process = astuple(Process.own())
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._last_answer, self._refused = time.monotonic(), False
        """When the store answered last, and whether a request has failed since."""
        # a connection of its own, because the one of the process group may be blocked by a rendezvous
        self._store = _dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._exchange, self._watch)]

    def __enter__(self) -> Watchdog:
        with suppress(RuntimeError):
            self._publish()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tells the other ranks whether this rank is done or failed with `error`."""
        self._stop.set()
        for thread in self._threads:
            thread.join(BEAT + 1.0)
        with suppress(RuntimeError):
            self._publish(ended="done" if error is None else f"{type(error).__name__}: {error}")

    def at(self, phase: str) -> None:
        """Sets the phase of this rank, which errors on the other ranks mention."""
        self._phase, self._since = phase, time.monotonic()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Within this context the rank counts as waiting for the other ranks."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def explain(self, error: Exception) -> RankError:
        """The error to raise when a collective has failed with `error`: it names the responsible rank.

        Waits up to three seconds for a message of that rank or the end of its process.
        """
        deadline = time.monotonic() + 3 * BEAT
        while time.monotonic() < deadline and not (self._failed() or self._dead()):
            time.sleep(0.1)
            try:
                self._read_others()
            except RuntimeError:
                # the store has ended with the rank that held it
                self._check_processes()
        texts = self._failed() or self._dead() or self._silent(2 * BEAT)
        culprit = "; ".join(texts) or f"a rank has closed its connection ({str(error).splitlines()[0]})"
        return RankError(f"rank {self.rank}, in {self._phase}, cannot go on: {culprit}")

    def raise_if_another_failed(self) -> None:
        """Raises RankError if another rank has failed or died, by the messages of the last second."""
        texts = self._failed() or self._dead()
        if texts:
            raise RankError(f"rank {self.rank}, in {self._phase}, cannot go on: {'; '.join(texts)}")

    def _exchange(self) -> None:
        """The thread that publishes this rank's state and reads those of the others."""
        while not self._stop.wait(BEAT):
            try:
                self._publish()
                self._read_others()
                self._last_answer, self._refused = time.monotonic(), False
            except RuntimeError:
                self._refused = True

    def _watch(self) -> None:
        """The thread that ends this process when another rank keeps it from going on."""
        while not self._stop.wait(BEAT):
            if (culprit := self._store_gone() or self._culprit()) is not None:
                self._end(culprit)

    def _store_gone(self) -> str | None:
        """The error if the store has not answered for too long, else None."""
        # a rank that waits for others cannot go on without the store; any other rank can wait longer for it
        longest = GRACE if self._refused and self._waited() else min(LOST, self.timeout)
        silence = time.monotonic() - self._last_answer
        if silence <= longest:
            return None
        return (
            f"the process that holds the ranks' store (rank 0, or its launcher) has not answered for "
            f"{silence:.0f} s: it is gone or frozen"
        )

    def _culprit(self) -> str | None:
        """The error that names the rank because of which this one cannot go on, or None."""
        if time.monotonic() - self._last_answer > 3 * BEAT:
            # messages of the others cannot be read, so their silence means nothing
            return None
        lost = self._silent(min(LOST, self.timeout))
        if lost:
            return "; ".join(lost)
        failed = self._failed()
        if failed and time.monotonic() - max(self.states[r].at for r in self.others) > GRACE:
            return "; ".join(failed)
        if dead := self._dead(GRACE):
            return "; ".join(dead)
        if self._waited() > self.timeout:
            # a rank that has been silent for half of that time has probably left the phase of its last
            # message
            late = self._silent(min(LOST, self.timeout) / 2) or [
                self._describe(r) for r in self.others if not self.states[r].message["waits"]
            ]
            where = "; ".join(late) or "every rank waits, so they wait for different things"
            waited = f"waited {self._waited():.0f} s"
            return f"{waited}, longer than distributed.timeout = {self.timeout:g} s: {where}"
        return None

    def _silent(self, longest: float) -> list[str]:
        """A sentence for each rank that has published nothing for more than `longest` seconds."""
        now = time.monotonic()
        silence = {r: now - s.at for r, s in self.states.items() if s.message.get("ended") != "done"}
        return [
            f"rank {rank} has given no sign of life for {seconds:.0f} s, last in "
            f"{self.states[rank].message['phase']}: it is frozen or was killed (perhaps by the system "
            "because memory ran out)"
            for rank, seconds in silence.items()
            if seconds > longest
        ]

    def _dead(self, longest: float = 0.0) -> list[str]:
        """A sentence for each rank whose process ended without an error, at least `longest` seconds ago."""
        now = time.monotonic()
        dead = {r: s for r, s in self.states.items() if s.died is not None and now - s.died >= longest}
        return [
            f"the process of rank {rank} (number {state.message['process'][1]}) has ended, last in "
            f"{state.message['phase']}, "
            + (KILLED if state.store_answered else "and the ranks' store with it: see that rank's own output")
            for rank, state in dead.items()
        ]

    def _failed(self) -> list[str]:
        """A sentence for each rank that has reported an error."""
        messages = {r: self.states[r].message for r in self.others}
        return [
            f"rank {r} failed in {message['phase']}: {message['ended']}"
            for r, message in messages.items()
            if message.get("ended", "done") != "done"
        ]

    def _describe(self, rank: int) -> str:
        message = self.states[rank].message
        return f"rank {rank} has been in {message['phase']} for {message['since']:.0f} s"

    def _waited(self) -> float:
        """Seconds for which this rank has been waiting for others; 0 if it is not."""
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    def _publish(self, **more: Any) -> None:
        """Writes this rank's message; at its end it has `ended`: "done" or the error."""
        now = time.monotonic()
        message = {
            "phase": self._phase,
            "since": now - self._since,
            "waits": self._waits_since is not None,
            "beat": now,
            "process": self._process,
        }
        with self._locked_store() as locked:
            if locked:
                self._store.set(f"sign/{self.rank}", json.dumps(message | more))

    @contextmanager
    def _locked_store(self) -> Generator[bool]:
        """True: this thread may use the store. False: another one waits for its answer, perhaps for ever."""
        locked = self._lock.acquire(timeout=BEAT)
        try:
            yield locked
        finally:
            if locked:
                self._lock.release()

    def _check_processes(self) -> None:
        """Finds ranks whose process has ended while the store cannot be read."""
        for state in self.states.values():
            if state.died is None and "ended" not in state.message and state.process_ended():
                state.died, state.store_answered = time.monotonic(), False

    def _read_others(self) -> None:
        """Reads the messages of the other ranks, and finds ranks whose process has ended without an error."""
        for rank in self.others:
            # before its message is read, so that an error which it published at its end is not missed
            process_ended = self.states[rank].process_ended()
            with self._locked_store() as locked:
                if not locked or not self._store.check([f"sign/{rank}"]):
                    continue
                message = json.loads(self._store.get(f"sign/{rank}"))
            if message != self.states[rank].message:
                self.states[rank] = RankState(message, time.monotonic())
            elif process_ended and "ended" not in message and self.states[rank].died is None:
                self.states[rank].died = time.monotonic()

    def _end(self, culprit: str) -> None:
        """Ends this process at once: its main thread is in a collective that may never return."""
        with suppress(RuntimeError):
            self._publish(ended=culprit)
        sys.stderr.write(f"rlhf train: rank {self.rank}, in {self._phase}, ends: {culprit}\n")
        sys.stderr.flush()
        os._exit(EXIT)


def deadline(timeout: float) -> timedelta:
    """Timeout of torch's own collectives: a little longer, so that the watchdog names the rank first."""
    return timedelta(seconds=timeout + 2 * GRACE)


def lost_connection(error: BaseException) -> bool:
    """Whether `error` is that of a collective which failed because of another rank."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text
        for part in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
    )
