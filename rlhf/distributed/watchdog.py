"""Nobody waits for ever, and the one that is waited for has a name.

Every rank says once a second where it is (its phase, how long it has been there, whether it waits for others)
in the store that the ranks have met by, and reads what the others say, from a thread of its own. Another
thread, which talks to nobody and so cannot hang, ends this process, naming the culprit, when

1. this rank has waited longer than `distributed.timeout`: the culprits are those that do not wait;
2. another rank has given no sign of life for that long, or for a minute: it is frozen, or was killed;
3. another rank has said why it failed, or its process has ended without a word, as those of the same machine
   see (liveness.py) and tell the others, and this one does not end by itself;
4. the store is gone or does not answer: the process that held it was killed, or is frozen.

A rank that dies closes its connections, so that a collective with it fails at once; `explain` then says which
rank it was and what it last did. Who waits for others in another way asks with `look`.
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
LOST = 60.0
GRACE = 10.0
KILLED = "without a word: it was killed, by the system, perhaps, for its memory"
EXIT = 3
"""Exit status of a rank that ends because of another one."""


class RankError(RuntimeError):
    """Another rank has failed, died or frozen. The message names it and where it was."""


@dataclass(slots=True)
class Sign:
    """The last sign of life of a rank, and when it came by this rank's clock."""

    said: dict[str, Any]
    at: float
    died: float | None = None
    """When its process was seen to have ended without having said why."""
    heard: bool = True
    """False: it may have said why, but the store has gone with it."""

    def process_ended(self) -> bool:
        return "process" in self.said and Process(*self.said["process"]).has_ended()


class Watchdog:
    """Of one rank among several, while the context lasts."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.others = [r for r in range(size) if r != rank]
        self.signs = {
            r: Sign({"phase": "start", "since": 0.0, "waits": False}, time.monotonic()) for r in self.others
        }
        self._phase, self._since, self._waits_since = "start", time.monotonic(), None
        self._process = astuple(Process.own())
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._met, self._refused = time.monotonic(), False
        """When the store has last answered, and whether it has refused to since."""
        # a connection of its own: the ranks' own may block it in a rendezvous
        self._store = _dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._talk, self._watch)]

    def __enter__(self) -> Watchdog:
        with suppress(RuntimeError):
            self._say()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """The others are told how this rank has ended."""
        self._stop.set()
        for thread in self._threads:
            thread.join(BEAT + 1.0)
        with suppress(RuntimeError):
            self._say(ended="done" if error is None else f"{type(error).__name__}: {error}")

    def at(self, phase: str) -> None:
        """What this rank does from here on."""
        self._phase, self._since = phase, time.monotonic()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """For the other ranks."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def explain(self, error: Exception) -> RankError:
        """What became of the others, when a collective with them has failed; waits for signs of it."""
        deadline = time.monotonic() + 3 * BEAT
        while time.monotonic() < deadline and not (self._ended() or self._dead()):
            time.sleep(0.1)
            try:
                self._listen()
            except RuntimeError:
                # the store has gone with the rank that held it
                self._see_dead()
        texts = self._ended() or self._dead() or self._silent(2 * BEAT)
        culprit = "; ".join(texts) or f"a rank has closed its connection ({str(error).splitlines()[0]})"
        return RankError(f"rank {self.rank}, in {self._phase}, cannot go on: {culprit}")

    def look(self) -> None:
        """Raises RankError where another rank has failed or died, as the last beat has shown."""
        texts = self._ended() or self._dead()
        if texts:
            raise RankError(f"rank {self.rank}, in {self._phase}, cannot go on: {'; '.join(texts)}")

    def _talk(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self._say()
                self._listen()
                self._met, self._refused = time.monotonic(), False
            except RuntimeError:
                self._refused = True

    def _watch(self) -> None:
        while not self._stop.wait(BEAT):
            if (culprit := self._store_gone() or self._culprit()) is not None:
                self._end(culprit)

    def _store_gone(self) -> str | None:
        """A rank that waits for others cannot go on without it; one that does not is in no hurry."""
        longest = GRACE if self._refused and self._waited() else min(LOST, self.timeout)
        silence = time.monotonic() - self._met
        if silence <= longest:
            return None
        return (
            f"the process by which the ranks have met (rank 0, or its launcher) has not answered for "
            f"{silence:.0f} s: it is gone or frozen"
        )

    def _culprit(self) -> str | None:
        if time.monotonic() - self._met > 3 * BEAT:
            # what the others say is not heard
            return None
        lost = self._silent(min(LOST, self.timeout))
        if lost:
            return "; ".join(lost)
        failed = self._ended()
        if failed and time.monotonic() - max(self.signs[r].at for r in self.others) > GRACE:
            return "; ".join(failed)
        if dead := self._dead(GRACE):
            return "; ".join(dead)
        if self._waited() > self.timeout:
            # one that has said nothing for half of that time is not where it said it was
            late = self._silent(min(LOST, self.timeout) / 2) or [
                self._place(r) for r in self.others if not self.signs[r].said["waits"]
            ]
            where = "; ".join(late) or "every rank waits, so they wait for different things"
            waited = f"waited {self._waited():.0f} s"
            return f"{waited}, longer than distributed.timeout = {self.timeout:g} s: {where}"
        return None

    def _silent(self, longest: float) -> list[str]:
        """What to say of the ranks that have given no sign for longer than that."""
        silence = {r: time.monotonic() - s.at for r, s in self.signs.items() if s.said.get("ended") != "done"}
        return [
            f"rank {rank} has given no sign of life for {seconds:.0f} s, last in "
            f"{self.signs[rank].said['phase']}: it is frozen or was killed (by the system, perhaps, for its "
            "memory)"
            for rank, seconds in silence.items()
            if seconds > longest
        ]

    def _dead(self, longest: float = 0.0) -> list[str]:
        """Of the ranks whose process has ended without a word, and was seen to for as long as that."""
        now = time.monotonic()
        dead = {r: s for r, s in self.signs.items() if s.died is not None and now - s.died >= longest}
        return [
            f"the process of rank {rank} (number {sign.said['process'][1]}) has ended, last in "
            f"{sign.said['phase']}, " + (KILLED if sign.heard else "and the store with it: see what it says")
            for rank, sign in dead.items()
        ]

    def _ended(self) -> list[str]:
        """Of the ranks that have said why they failed."""
        said = {r: self.signs[r].said for r in self.others}
        return [
            f"rank {r} failed in {s['phase']}: {s['ended']}"
            for r, s in said.items()
            if s.get("ended", "done") != "done"
        ]

    def _place(self, rank: int) -> str:
        said = self.signs[rank].said
        return f"rank {rank} has been in {said['phase']} for {said['since']:.0f} s"

    def _waited(self) -> float:
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    def _say(self, **more: Any) -> None:
        now = time.monotonic()
        said = {
            "phase": self._phase,
            "since": now - self._since,
            "waits": self._waits_since is not None,
            "beat": now,
            "process": self._process,
        }
        with self._alone() as alone:
            if alone:
                self._store.set(f"sign/{self.rank}", json.dumps(said | more))

    @contextmanager
    def _alone(self) -> Generator[bool]:
        """False when another thread is waiting for an answer of the store, which may never come."""
        alone = self._lock.acquire(timeout=BEAT)
        try:
            yield alone
        finally:
            if alone:
                self._lock.release()

    def _see_dead(self) -> None:
        for sign in self.signs.values():
            if sign.died is None and "ended" not in sign.said and sign.process_ended():
                sign.died, sign.heard = time.monotonic(), False

    def _listen(self) -> None:
        for rank in self.others:
            # looked at before: what it said at its end is then heard
            ended = self.signs[rank].process_ended()
            with self._alone() as alone:
                if not alone or not self._store.check([f"sign/{rank}"]):
                    continue
                said = json.loads(self._store.get(f"sign/{rank}"))
            if said != self.signs[rank].said:
                self.signs[rank] = Sign(said, time.monotonic())
            elif ended and "ended" not in said and self.signs[rank].died is None:
                self.signs[rank].died = time.monotonic()

    def _end(self, culprit: str) -> None:
        """The main thread is in a collective that may never return: there is no other way to end it."""
        with suppress(RuntimeError):
            self._say(ended=culprit)
        sys.stderr.write(f"rlhf train: rank {self.rank}, in {self._phase}, ends: {culprit}\n")
        sys.stderr.flush()
        os._exit(EXIT)


def deadline(timeout: float) -> timedelta:
    """Of torch's own collectives: a little later, so that the culprit is named first."""
    return timedelta(seconds=timeout + 2 * GRACE)


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text
        for part in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
    )
