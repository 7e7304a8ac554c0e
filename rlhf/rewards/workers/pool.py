"""The workers of one reward function: calls queue up, free workers take some, lost ones are replaced.

One thread a worker, which waits for it; so scoring goes on while the trainer does something else. A sample is
never lost: its call is answered, or failed with a reason, whatever becomes of the worker.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.rewards.plugin import RewardSpec, Signature
from rlhf.rewards.workers.process import StartError, WorkerLost, WorkerProcess

MOST_WORKERS = 8
MOST_CALLS = 64
"""Of one job: what a worker is given at once."""


class RewardError(RuntimeError):
    """A reward function returns what is no reward, cannot be run, or too many samples got none."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call gave no scores."""

    kind: str
    """"exception", "timeout", "died", "value" or "wrong"."""
    message: str
    details: str = ""
    """The user's traceback, or what the process wrote last."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one call. Example: `Outcome([{"brevity": 1.0}], 0.001, None)`."""

    scores: list[dict[str, float] | None]
    """One a sample; None where there is none."""
    seconds: float
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Call:
    """Samples for one call of the function."""

    samples: tuple[int, ...]
    arguments: Callable[[tuple[int, ...]], Mapping[str, Any]]
    finish: Callable[[tuple[int, ...], Outcome], None]
    is_wanted: Callable[[], bool]
    alone: bool = False
    """In a job of its own: one of several that were under way when a worker was lost."""

    def pieces(self) -> list[Call]:
        return [Call((i,), self.arguments, self.finish, self.is_wanted) for i in self.samples]


class WorkerPool:
    """`start`, then `submit` as often as there is something to score; `close` ends every process."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        self.name, self.spec = name, spec
        self.signature: Signature | None = None
        self.log: Callable[[str], None] = lambda text: None
        """Gets what the function prints."""
        self._ready: list[WorkerProcess] = []
        self._queue: deque[Call] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._busy: set[WorkerProcess] = set()
        self._closing = False
        self._broken: Exception | None = None

    def start(self) -> None:
        """Begins to start the first worker."""
        self._ready.append(self._new_worker())

    def wait_ready(self) -> Signature:
        """What the function asks for. Raises StartError: it cannot be loaded."""
        if self.signature is None:
            try:
                self.signature = self._ready[0].ready()
            except StartError:
                self._ready.clear()
                raise
        return self.signature

    @property
    def num_workers(self) -> int:
        assert self.signature is not None
        if self.spec.workers is not None:
            return self.spec.workers
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) // ranks
        return 1 if self.signature.is_class else max(1, min(MOST_WORKERS, cores))

    def submit(self, calls: Sequence[Call]) -> None:
        """Queues calls, whose `finish` is called from other threads. Raises RewardError if it cannot."""
        with self._changed:
            self._check()
            self._queue.extend(calls)
            while len(self._threads) < self.num_workers:
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def check(self) -> None:
        """Raises RewardError when no worker can be started any more."""
        with self._changed:
            self._check()

    def close(self) -> None:
        """Ends every process; calls still queued are never finished. It may be used again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            threads, self._threads = self._threads, []
            idle, self._ready = self._ready, []
            for worker in self._busy:
                worker.interrupt()
        for worker in idle:
            worker.end()
        for thread in threads:
            thread.join()
        self._queue.clear()
        self._closing = False

    def _check(self) -> None:
        if self._broken is not None:
            raise RewardError(f"reward function {self.name} cannot be run any more: {self._broken}")

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(self.name, self.spec, lambda text: self.log(text))

    def _serve(self) -> None:
        """The life of one worker after another."""
        worker: WorkerProcess | None = None
        try:
            while self._wait_for_work():
                worker = worker or self._ready_worker()
                if not self._run(worker, self._take()):
                    worker = None
        except Exception as error:
            # whoever waits for a result is told by `check`; nobody sees an exception of a thread
            with self._changed:
                self._broken = self._broken or error
                self._changed.notify_all()
        finally:
            if worker is not None:
                worker.end()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing or self._broken)
            return not self._closing and self._broken is None

    def _ready_worker(self) -> WorkerProcess:
        with self._changed:
            if self._ready:
                return self._ready.pop()
        worker = self._new_worker()
        worker.ready()
        return worker

    def _take(self) -> list[Call]:
        """The next job: smaller and smaller, so that all workers are done at about the same time."""
        with self._changed:
            size = min(MOST_CALLS, -(-len(self._queue) // (4 * self.num_workers)))
            calls: list[Call] = []
            while self._queue and len(calls) < size and not (calls and self._queue[0].alone):
                call = self._queue.popleft()
                if not call.is_wanted():
                    continue
                calls.append(call)
                if call.alone:
                    break
            return calls

    def _run(self, worker: WorkerProcess, calls: list[Call]) -> bool:
        """Has a job done. False: the worker is lost."""
        assert self.signature is not None
        unanswered = dict(enumerate(calls))
        with self._changed:
            if self._closing or not calls:
                return True
            self._busy.add(worker)
        try:
            arguments = [call.arguments(call.samples) for call in calls]
            for number, answer in worker.run(arguments, is_async=self.signature.is_async):
                call = unanswered.pop(number)
                if not unanswered:
                    # whoever waits for this answer may close the pool: what the worker printed is still heard
                    with self._changed:
                        self._busy.discard(worker)
                self._answered(call, answer)
        except WorkerLost as lost:
            self._lost(unanswered, lost)
            return False
        finally:
            with self._changed:
                self._busy.discard(worker)
        return True

    def _answered(self, call: Call, answer: Mapping[str, Any]) -> None:
        """Raises nothing for what a function did: the failure is the outcome."""
        seconds, samples = float(answer["seconds"]), len(call.samples)
        if "scores" in answer:
            _, cause = answer["cause"] or (0, None)
            failure = None if cause is None else Failure("value", cause)
            call.finish(call.samples, Outcome(list(answer["scores"]), seconds, failure))
        elif "wrong" in answer:
            failure = Failure("wrong", answer["wrong"])
            call.finish(call.samples, Outcome([None] * samples, seconds, failure))
        elif "timeout" in answer:
            self._fail(call, Failure("timeout", _slow(answer["timeout"])), seconds)
        else:
            self._fail(call, Failure("exception", answer["raised"], answer["traceback"]), seconds)

    def _lost(self, unanswered: dict[int, Call], lost: WorkerLost) -> None:
        """The call under way is to blame; where that may be one of several, each is made again by itself.

        Several: those of an async function, and those whose answers were not sent when the worker died.
        """
        assert self.signature is not None
        if self._closing:
            return
        under_way = lost.call if lost.call in unanswered else min(unanswered)
        exact = lost.kind == "timeout" or under_way == min(unanswered)
        if len(unanswered) > 1 and (self.signature.is_async or not exact):
            last = max(unanswered) if self.signature.is_async else under_way
            again = [replace(c, alone=True) if i <= last else c for i, c in unanswered.items()]
            self._requeue(again)
            return
        culprit = unanswered.pop(under_way)
        self._requeue(list(unanswered.values()))
        seconds = self.spec.timeout * len(culprit.samples)
        message = _slow(seconds) if lost.kind == "timeout" else str(lost)
        self._fail(culprit, Failure(lost.kind, message, lost.output), seconds)

    def _fail(self, call: Call, failure: Failure, seconds: float) -> None:
        """A call of several samples that need not be together is made again with each alone."""
        if len(call.samples) > 1 and isinstance(self.spec.batch, int):
            self._requeue(call.pieces())
        else:
            call.finish(call.samples, Outcome([None] * len(call.samples), seconds, failure))

    def _requeue(self, calls: Sequence[Call]) -> None:
        with self._changed:
            self._queue.extendleft(reversed(calls))
            self._changed.notify_all()


def _slow(seconds: float) -> str:
    return f"it took longer than {seconds:g} s"
