"""The worker's side: loads one reward function, calls it in the main thread and sends scores as JSON lines.

The worker receives what to load, answers that it is ready or why it is not, and then answers each call of
each job, until the trainer closes the connection. It reads pickles, which come from the trainer. It writes
only JSON: the reward function shares the process and could have written the bytes, so the trainer must not
unpickle them.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import os
import pickle
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf.rewards.plugin import Reward, RewardSpec
from rlhf.rewards.workers.call_log import CallLog, with_objects
from rlhf.rewards.workers.progress import Progress
from rlhf.rewards.workers.return_values import (
    Scores,
    WrongReturn,
    is_finite,
    read_scores,
    read_values,
    run_now,
)

SEND_SECONDS = 0.02
"""How long an answer may wait, so that several are sent together."""
LONGEST_TEXT = 8000
"""Characters of a message or a traceback that are kept at most."""

OURS = {
    "rlhf.plugins",
    "rlhf.rewards.judges.plugin",
    "rlhf.rewards.plugin",
    "rlhf.rewards.signature",
    "rlhf.rewards.workers.worker",
}
"""Modules whose frames are left out of tracebacks: they do not concern the author of a reward function."""

Answer = dict[str, Any]


def serve(connection: int, progress: int, folder: str) -> None:
    """Serves one reward function until the other end of the socket `connection` is closed.

    The function is imported, or its class constructed, in the folder where the run was started, so that
    relative paths in a config work. It is called in `folder`, which belongs to this worker alone.
    """
    os.set_inheritable(connection, False)
    os.set_inheritable(progress, False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=False)
    with socket.socket(fileno=connection) as trainer, trainer.makefile("rb") as requests:
        answers = Answers(trainer)
        name, spec = pickle.load(requests)
        try:
            worker = Worker(name, spec, spec.load(), answers, Progress(progress))
            os.chdir(folder)
        except BaseException as error:
            # the user's module may raise anything when it is imported; the trainer must learn of it
            answers.add({"refused": _refusal(name, error), **describe(error)})
            answers.send()
            return
        answers.add({"ready": asdict(worker.reward.signature)})
        answers.send()
        while True:
            try:
                number, job = pickle.load(requests)
            except EOFError:
                return
            worker.run(number, job)


class Answers:
    """Collects answers and sends several at a time, because each message wakes the trainer up."""

    def __init__(self, trainer: socket.socket) -> None:
        self.trainer, self.waiting, self.sent_at = trainer, b"", 0.0

    def add(self, answer: Answer) -> None:
        self.waiting += json.dumps(answer).encode() + b"\n"

    def send_if_due(self) -> None:
        if time.monotonic() - self.sent_at > SEND_SECONDS:
            self.send()

    def send(self) -> None:
        self.trainer.sendall(self.waiting)
        self.waiting, self.sent_at = b"", time.monotonic()


class Worker:
    """Calls the reward function for the calls of a job: in order, or several at once if it is async."""

    def __init__(
        self, name: str, spec: RewardSpec, reward: Reward, answers: Answers, progress: Progress
    ) -> None:
        self.name, self.spec, self.reward = name, spec, reward
        self.answers, self.progress = answers, progress

    def run(self, number: int, job: Sequence[Mapping[str, Any]]) -> None:
        allow_cpu_seconds(self.spec.timeout * sum(len(arguments["completions"]) for arguments in job))
        if self.reward.signature.is_async:
            run_now(self._run_together(job))
            return
        for call, arguments in enumerate(job):
            self.progress.begin(number, call)
            started, log = time.perf_counter(), CallLog(len(arguments["completions"]))
            try:
                returned = self.reward(with_objects(arguments, log))
                if inspect.iscoroutine(returned):
                    returned = run_now(returned)
                result = self._read(returned, arguments) | log.answer()
            except BaseException as error:
                # a function may raise anything, even SystemExit; the other calls continue
                result = describe(error)
            self.answers.add({"call": call, "seconds": time.perf_counter() - started, **result})
            self.answers.send_if_due()
        self.answers.send()

    async def _run_together(self, job: Sequence[Mapping[str, Any]]) -> None:
        import asyncio

        async def one(call: int, arguments: Mapping[str, Any]) -> None:
            async with slots:
                started, log = time.perf_counter(), CallLog(len(arguments["completions"]))
                seconds = self.spec.timeout * log.samples
                limit = asyncio.timeout(seconds)
                try:
                    async with limit:
                        returned = await self.reward(with_objects(arguments, log))
                        result = self._read(returned, arguments) | log.answer()
                except BaseException as error:
                    timed_out = isinstance(error, TimeoutError) and limit.expired()
                    result = {"timeout": seconds} if timed_out else describe(error)
                self.answers.add({"call": call, "seconds": time.perf_counter() - started, **result})
                self.answers.send()

        slots = asyncio.Semaphore(self.spec.concurrency)
        await asyncio.gather(*(one(call, arguments) for call, arguments in enumerate(job)))

    def _read(self, returned: object, arguments: Mapping[str, Any]) -> Answer:
        """`scores`: None for a value that is not finite; `cause`: index and text of the first such value."""
        scores: list[Scores | None] = []
        cause: tuple[int, str] | None = None
        for place, value in enumerate(read_values(returned, len(arguments["completions"]))):
            read = read_scores(value, self.name)
            finite = is_finite(read)
            if not finite and cause is None:
                cause = place, f"{value!r:.200}"
            scores.append(read if finite else None)
        return {"scores": scores, "cause": cause}


def describe(error: BaseException, is_ours: Callable[[str], bool] = OURS.__contains__) -> Answer:
    """An exception as an answer: type, message, and traceback from the first frame of the user's code on.

    `is_ours` says of the name of a module whether its frames are left out.
    """
    if isinstance(error, WrongReturn):
        return {"wrong": str(error)[:LONGEST_TEXT]}
    frames = error.__traceback__
    while frames is not None and is_ours(str(frames.tb_frame.f_globals.get("__name__"))):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return {"raised": raised(error), "traceback": text[-LONGEST_TEXT:]}


def raised(error: BaseException) -> str:
    """Type and message of an exception."""
    # not str(error): the __str__ of an exception may itself raise
    _, colon, message = traceback.format_exception_only(error)[-1].strip().partition(": ")
    return f"{type(error).__name__}{colon}{message}"[:LONGEST_TEXT]


def allow_cpu_seconds(seconds: float) -> None:
    """Limits the CPU time from now on to what all cores can use in `seconds`, and 1 to 2 s more.

    The trainer enforces the deadline; this limit ends an endless loop even if the trainer cannot.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds * (os.cpu_count() or 1)) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _refusal(name: str, error: BaseException) -> str | None:
    """The message of an error that this project raised, which is enough; None for the user's module's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    module = "" if frames is None else str(frames.tb_frame.f_globals.get("__name__"))
    if not isinstance(error, ValueError) or not module.startswith("rlhf."):
        return None
    return str(error) if module in OURS else f"reward function {name}: {error}"
