"""The worker pool of one reward function: queues calls, hands them to free workers, replaces lost workers.

Each worker has one thread in the trainer, which waits for it, so scoring continues while the trainer does
other work. No sample is lost: whatever happens to a worker, each of its calls gets an outcome, with scores or
a failure.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.signature import Signature
from rlhf.rewards.workers.environment import hidden
from rlhf.rewards.workers.kept import StartError, WorkerLost
from rlhf.rewards.workers.process import WorkerProcess
from rlhf.rewards.workers.return_values import Scores, scores_of_json

logger = logging.getLogger(__name__)
MOST_WORKERS = 8
MOST_CALLS = 64
"""Most calls of one job; a job is what a worker is given at once."""


def print_to(path: Path, name: str, text: str) -> None:
    """Appends what a function printed to a file, each line preceded by the name.

    The file is only for people to read: if it cannot be written, the output is dropped.
    """
    with suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(f"{name}: {line}\n" for line in text.splitlines()))


class RewardError(RuntimeError):
    """A function cannot be run, or returns something that is not a reward, or too many samples failed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call gave no scores."""

    kind: str
    """"exception", "timeout", "died", "value" or "wrong"."""
    message: str
    details: str = ""
    """The traceback of the user's code, or the last output of the process."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one call. Example: `Outcome([{"brevity": 1.0}], 0.001, None)`."""

    scores: list[Scores | None]
    """One entry per sample; None for a sample that got no scores."""
    seconds: float
    failure: Failure | None
    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """What the function logged with `log_metric`."""
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """What the function logged with `log_extra`: a text for each sample, by column."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the function, with one or several samples."""

    samples: tuple[int, ...]
    arguments: Callable[[tuple[int, ...]], Mapping[str, Any]]
    """Makes the keyword arguments when the call is sent."""
    finish: Callable[[tuple[int, ...], Outcome], None]
    """Called with the outcome."""
    is_wanted: Callable[[], bool]
    """False: scoring was given up, and the call is dropped."""
    alone: bool = False
    """Whether it must be in a job of its own: it was one of several under way when a worker was lost."""

    def split(self) -> list[Call]:
        """The same samples, each in a call of its own."""
        return [Call((i,), self.arguments, self.finish, self.is_wanted) for i in self.samples]


class WorkerPool:
    """Call `start` once, `submit` whenever there are samples to score, and `close` to end all processes."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        self.name, self.spec = name, spec
        self.signature: Signature | None = None
        self.log: Callable[[str], None] = lambda text: None
        """Called with what the function prints."""
        self._ready: list[WorkerProcess] = []
        self._queue: deque[Call] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._busy: set[WorkerProcess] = set()
        self._closing = False
        self._broken: Exception | None = None
        self.replaced = 0
        """Workers that were replaced because earlier calls had used up their memory."""

    @property
    def called(self) -> str:
        """What messages call it: what it is, and its name."""
        return f"{self.spec.kind} {self.name}"

    def start(self) -> None:
        """Starts the first worker, without waiting until it is ready."""
        self._ready.append(self._new_worker())

    def wait_ready(self) -> Signature:
        """Waits for the first worker; returns the function's signature. Raises StartError."""
        if self.signature is None:
            try:
                self.signature = self._ready[0].ready()
            except StartError:
                self._ready.clear()
                raise
        return self.signature

    def check_cache(self) -> None:
        """Raises ValueError when scores are cached that depend on more than the sample."""
        if not self.spec.cache:
            return
        if not isinstance(self.spec.batch, int):
            raise ValueError(
                f"reward function {self.name} sees whole groups or steps, so its score of a sample may "
                "depend on other samples: set its cache to 0"
            )
        if "trainer_state" in (self.wait_ready().accepts or ()):
            raise ValueError(
                f"reward function {self.name} asks for trainer_state, which changes from step to step: "
                "set its cache to 0"
            )

    def log_failure(self, sample: str, failure: Failure) -> None:
        """Warns of a failure on a sample, by its name."""
        details = f"\n{failure.details.rstrip()}" if failure.details else ""
        logger.warning(
            "%s failed on %s %s, which is not learned from: %s%s\n"
            "(this is logged once; the metric reward/failed/%s counts all)",
            self.called,
            self.spec.scored,
            sample,
            failure.message,
            details,
            self.name,
        )

    @property
    def num_workers(self) -> int:
        """The setting `workers`; without it 1 for a class, else this rank's share of the cores, at most 8."""
        assert self.signature is not None
        if self.spec.workers is not None:
            return self.spec.workers
        return 1 if self.signature.is_class else share_of_cores()

    def submit(self, calls: Sequence[Call]) -> None:
        """Queues calls; `finish` of each is called from another thread. Raises what `check` raises."""
        with self._changed:
            self._check()
            self._queue.extend(calls)
            while len(self._threads) < self.num_workers:
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def check(self) -> None:
        """Raises RewardError when no worker can be started any more, with the reason."""
        with self._changed:
            self._check()

    def close(self) -> None:
        """Ends all processes; calls still in the queue are dropped. The pool may be used again afterwards."""
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
            raise RewardError(f"{self.called} cannot be run any more: {self._broken}")

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(self.name, self.spec, lambda text: self.log(text))

    def _serve(self) -> None:
        """Runs in a thread: gives jobs to one worker, and starts another when that worker is lost."""
        worker: WorkerProcess | None = None
        try:
            while self._wait_for_work():
                worker = worker or self._ready_worker()
                if not self._run(worker, self._take()):
                    worker = None
        except Exception as error:
            # nobody sees an exception in a thread, so it is kept and raised by `check`
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
        """The next job. Jobs shrink with the queue, so that all workers finish at about the same time."""
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
        """Has a worker do a job. False if the worker was lost."""
        assert self.signature is not None
        unanswered = dict(enumerate(calls))
        with self._changed:
            if self._closing or not calls:
                return True
            self._busy.add(worker)
        try:
            arguments = [call.arguments(call.samples) for call in calls]
            for number, answer in worker.run(arguments, is_async=self.signature.is_async):
                if worker.has_answered and _lacks_memory(answer):
                    # earlier calls may have left it none: a new worker is asked again
                    worker.end()
                    self._ask_again(unanswered)
                    return False
                worker.has_answered = True
                call = unanswered.pop(number)
                if not unanswered:
                    # whoever waits for this answer may now close the pool: the worker is then ended, not
                    # interrupted, so that its last output is still logged
                    with self._changed:
                        self._busy.discard(worker)
                self._answered(call, answer)
        except WorkerLost as lost:
            if worker.has_answered and lost.for_memory and not self._closing:
                self._ask_again(unanswered)
            else:
                self._lost(unanswered, lost)
            return False
        finally:
            with self._changed:
                self._busy.discard(worker)
        return True

    def _ask_again(self, unanswered: dict[int, Call]) -> None:
        """Queues the calls of a worker that has ended because its memory was used up."""
        with self._changed:
            self.replaced += 1
        self._requeue(list(unanswered.values()))

    def _answered(self, call: Call, answer: Mapping[str, Any]) -> None:
        """Finishes a call with its answer. Whatever the function did, the failure is part of the outcome."""
        seconds, samples = float(answer["seconds"]), len(call.samples)
        if "scores" in answer:
            _, cause = answer["cause"] or (0, None)
            failure = None if cause is None else Failure("value", cause)
            scores = [None if read is None else scores_of_json(read) for read in answer["scores"]]
            call.finish(call.samples, Outcome(scores, seconds, failure, **_logged(answer)))
        elif "wrong" in answer:
            failure = Failure("wrong", answer["wrong"])
            call.finish(call.samples, Outcome([None] * samples, seconds, failure))
        elif "timeout" in answer:
            self._fail(call, Failure("timeout", _slow(answer["timeout"])), seconds)
        else:
            raised = answer["raised"] + hidden(answer["raised"], self.spec)
            self._fail(call, Failure("exception", raised, answer["traceback"]), seconds)

    def _lost(self, unanswered: dict[int, Call], lost: WorkerLost) -> None:
        """Fails the call that was under way when the worker was lost; queues the other calls again.

        If the call under way may be one of several, each of them is repeated in a job of its own. That is so
        for async functions, and when answers of earlier calls had not been sent when the worker died.
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
        """Finishes a call as failed, or repeats it with each sample alone if the samples may be separated."""
        if len(call.samples) > 1 and isinstance(self.spec.batch, int):
            self._requeue(call.split())
        else:
            call.finish(call.samples, Outcome([None] * len(call.samples), seconds, failure))

    def _requeue(self, calls: Sequence[Call]) -> None:
        with self._changed:
            self._queue.extendleft(reversed(calls))
            self._changed.notify_all()


def share_of_cores() -> int:
    """This rank's share of the cores, at least 1 and at most MOST_WORKERS."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


def _logged(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an answer that `Outcome` keeps of what was logged."""
    logged = answer.get("logged", {})
    return {key: logged[key] for key in ("metrics", "extra") if key in logged}


def _lacks_memory(answer: Mapping[str, Any]) -> bool:
    """Whether a call failed for want of memory, by the words of Python, numpy, torch and the system."""
    return re.search(r"MemoryError|[Cc]an(not|'t) allocate memory", answer.get("raised", "")) is not None


def _slow(seconds: float) -> str:
    return f"it took longer than {seconds:g} s"
