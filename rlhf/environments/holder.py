"""One process of environments and the thread that waits for it: requests, deadlines, what is lost with it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.environments.process import EnvironmentProcess, request
from rlhf.environments.protocol import Ending, Lost, Reply
from rlhf.environments.spec import EnvironmentSpec
from rlhf.environments.wire import read
from rlhf.rewards.workers.environment import hidden
from rlhf.rewards.workers.kept import NO_ANSWER, StartError, WorkerLost

GRACE_SECONDS = 2.0
"""How long a process has to give up an episode whose time is up; then it is killed with all its episodes."""
IDLE_SECONDS = 3600.0
"""How long the thread waits at once when nothing is under way."""

Finish = Callable[[Any], None]


@dataclass(slots=True)
class Call:
    """A request that has no answer yet."""

    number: int
    do: str
    finish: Finish
    deadline: float
    is_late: bool = False
    """Whether the process was told to give the episode up."""
    stack: str = ""
    """Where it is, if the process has said so."""


@dataclass(slots=True)
class Held:
    """An episode, as the trainer's side sees it."""

    number: int
    name: str
    """Of the environment."""
    holder: Holder
    call: Call | None = None
    lost: Lost | None = None
    """Why it is lost, if nobody was waiting then; told at its next call."""
    is_dropped: bool = False


@dataclass(slots=True)
class Holder:
    """Episodes of one process. `lock` is shared with the pool and guards all fields."""

    make: Callable[[], EnvironmentProcess]
    """Makes the process and waits until it is ready; raises StartError."""
    spec: EnvironmentSpec
    lock: threading.RLock
    process: EnvironmentProcess | None = None
    """None until its thread has started it."""
    held: dict[int, Held] = field(default_factory=dict[int, Held])
    waiting: list[bytes] = field(default_factory=list[bytes])
    """Requests from before the process was ready."""
    is_retired: bool = False
    """Whether it takes no new episodes: a function of an earlier one still runs in it, or it is gone."""
    is_closing: bool = False
    thread: threading.Thread = field(init=False)
    _calls: int = 0

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)

    def ask(self, held: Held, do: str, arguments: Mapping[str, Any], finish: Finish) -> None:
        """Sends a request of an episode, whose time begins now. A lost episode is told at once."""
        with self.lock:
            if held.lost is not None:
                lost = held.lost
                threading.Thread(target=finish, args=(lost,), daemon=True).start()
                return
            assert held.call is None, "an episode has one call at a time"
            asked = request(self._calls + 1, do, held.number, arguments)
            self._calls += 1
            held.call = Call(self._calls, do, finish, time.monotonic() + self.spec.timeout)
            self.held[held.number] = held
            self._post(asked)

    def drop(self, held: Held) -> None:
        """Gives an episode up; if a call of it is under way, that is still answered."""
        with self.lock:
            held.is_dropped = True
            if held.lost is None:
                self._post(request(0, "drop", held.number))
                if held.call is None:
                    self._forget(held)

    def close(self) -> None:
        """Has the thread end the process. Calls that are under way are lost."""
        with self.lock:
            self.is_closing = self.is_retired = True
            if self.process is not None:
                self.process.wake()

    def _post(self, asked: bytes) -> None:
        if self.process is None:
            self.waiting.append(asked)
        else:
            self.process.post(asked)

    def _run(self) -> None:
        """Runs in the thread: starts the process, hears its answers, and tells what is lost when it ends."""
        process: EnvironmentProcess | None = None
        why = Lost("died", "the environments were closed")
        try:
            process = self.make()
            self._started(process)
            while self._goes_on():
                self._hear(process)
        except StartError as error:
            why = Lost("died", str(error))
        except WorkerLost as lost:
            why = Lost("memory" if lost.for_memory else lost.kind, str(lost), lost.output)
        except Exception as error:
            # nobody sees an exception in a thread; whoever waits for an episode must
            why = Lost("died", f"{type(error).__name__}: {error}")
            raise
        finally:
            try:
                if process is not None:
                    process.end()
            finally:
                self._lose(why)

    def _started(self, process: EnvironmentProcess) -> None:
        with self.lock:
            self.process = process
            for asked in self.waiting:
                process.post(asked)
            self.waiting.clear()
            for held in self.held.values():
                # the time that the process needed to start is not the environment's
                if held.call is not None:
                    held.call.deadline = time.monotonic() + self.spec.timeout

    def _goes_on(self) -> bool:
        with self.lock:
            return not self.is_closing and (bool(self.held) or not self.is_retired)

    def _hear(self, process: EnvironmentProcess) -> None:
        with self.lock:
            calls = [held.call for held in self.held.values() if held.call is not None]
            until = min((call.deadline for call in calls), default=time.monotonic() + IDLE_SECONDS)
        for answer in process.answers(until):
            finish = self._heard(process, answer)
            if finish is not None:
                finish()
        now = time.monotonic()
        with self.lock:
            late = [h for h in self.held.values() if h.call is not None and h.call.deadline <= now]
        for held in late:
            self._late(process, held)

    def _heard(self, process: EnvironmentProcess, answer: Mapping[str, Any]) -> Callable[[], None] | None:
        """Takes an answer in; returns what tells it to who waits for it."""
        with self.lock:
            if "abandoned" in answer:
                return self._given_up(process, answer)
            number = answer.get("call")
            held = next(
                (h for h in self.held.values() if h.call is not None and h.call.number == number), None
            )
            if held is None or held.call is None:
                # an episode that was given up may still have answered
                if not isinstance(number, int) or not 0 < number <= self._calls:
                    process.lose("died", f"{NO_ANSWER}: {answer!r:.200}")
                return None
            if held.call.is_late:
                return None
            call, expected = held.call, Ending if held.call.do == "end" else Reply
            try:
                outcome = read(answer, expected)
            except (ValueError, TypeError, KeyError, AttributeError):
                process.lose("died", f"{NO_ANSWER}: {answer!r:.200}")
            held.call = None
            if isinstance(outcome, Lost):
                outcome = replace(outcome, message=outcome.message + hidden(outcome.message, self.spec))
            if call.do == "end" or isinstance(outcome, Lost) or held.is_dropped:
                self._forget(held)
                held.lost = outcome if isinstance(outcome, Lost) else held.lost
            return lambda: call.finish(outcome)

    def _late(self, process: EnvironmentProcess, held: Held) -> None:
        """Has an episode given up; if that fails, the process is killed."""
        call = held.call
        if call is None:
            return
        if call.is_late:
            process.kill_late()
        call.is_late, call.deadline = True, time.monotonic() + GRACE_SECONDS
        process.post(request(0, "abandon", held.number))

    def _given_up(self, process: EnvironmentProcess, answer: Mapping[str, Any]) -> Callable[[], None] | None:
        held = self.held.get(answer["abandoned"])
        if held is None or held.call is None or not held.call.is_late:
            process.lose("died", f"{NO_ANSWER}: {answer!r:.200}")
        if answer.get("stuck"):
            held.call.stack = str(answer["stack"])
            process.kill_late()
        if not answer.get("ended"):
            self.is_retired = True
        call, lost = held.call, self._slow(held, str(answer.get("stack", "")))
        held.call, held.lost = None, lost
        self._forget(held)
        return lambda: call.finish(lost)

    def _slow(self, held: Held, details: str) -> Lost:
        return Lost(
            "timeout", f"environment {held.name}: it took longer than {self.spec.timeout:g} s", details
        )

    def _forget(self, held: Held) -> None:
        self.held.pop(held.number, None)
        if self.is_retired and not self.held and self.process is not None:
            self.process.wake()

    def _lose(self, why: Lost) -> None:
        """The process is gone, and all its episodes with it."""
        told: list[tuple[Finish, Lost]] = []
        with self.lock:
            self.is_retired = True
            late = [held for held in self.held.values() if held.call is not None and held.call.is_late]
            reason = why.message
            if why.kind == "timeout" and late:
                reason = (
                    f"{late[0].name} took longer than {self.spec.timeout:g} s in it and could not be stopped"
                )
            for held in self.held.values():
                call = held.call
                held.call, held.lost = None, self._lost(held, call, why, reason)
                if call is not None:
                    told.append((call.finish, held.lost))
            self.held.clear()
        for finish, lost in told:
            with suppress(Exception):
                finish(lost)

    def _lost(self, held: Held, call: Call | None, why: Lost, reason: str) -> Lost:
        if why.kind != "timeout":
            return Lost(why.kind, f"environment {held.name}: its process is gone: {reason}", why.details)
        if call is not None and call.is_late:
            return self._slow(held, call.stack or busy_threads(why.details))
        return Lost("died", f"environment {held.name}: its process was killed: {reason}")


def busy_threads(stacks: str) -> str:
    """Of the stacks of all threads, as faulthandler writes them, those that do not just wait."""
    threads = re.split(r"(?=^(?:Current thread|Thread) 0x)", stacks, flags=re.MULTILINE)
    idle = re.compile(r'.*\n  File "[^"]*/(?:rlhf/environments/worker|threading|socket|selectors)\.py"')
    return "".join(thread for thread in threads if not idle.match(thread))
