"""The process in which one reward function runs, in its main thread, until the trainer closes the connection.

It is told what to load, says that it is ready or why it cannot be, and then answers each call of each job in
a line of JSON. What it reads comes from the trainer and is pickled; what it writes is data only, because the
function shares the process and may have written it.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from rlhf.rewards.plugin import Reward, RewardSpec, load_reward
from rlhf.rewards.workers.progress import Progress
from rlhf.rewards.workers.values import WrongReturn, is_finite, read_scores, read_values, run_now

SEND_SECONDS = 0.02
"""How long an answer may wait for others to be sent with it."""
LONGEST_TEXT = 8000
"""Of a message or a traceback, in characters."""

OURS = {"rlhf.plugins", "rlhf.rewards.plugin", "rlhf.rewards.workers.worker"}
"""Modules whose frames say nothing to the user of a reward function."""

Answer = dict[str, Any]


def serve(connection: int, progress: int, folder: str) -> None:
    """Runs until the other end of the socket `connection` is closed.

    A function is imported, and a class made, where the run was started: relative paths in a config mean what
    they say. It is called in `folder`, which is its own.
    """
    os.set_inheritable(connection, False)
    os.set_inheritable(progress, False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=False)
    with socket.socket(fileno=connection) as trainer, trainer.makefile("rb") as requests:
        answers = Answers(trainer)
        name, spec = pickle.load(requests)
        try:
            worker = Worker(name, spec, load_reward(spec), answers, Progress(progress))
            os.chdir(folder)
        except BaseException as error:
            # whatever the user's module does when it is imported, the trainer is told
            refused = str(error) if isinstance(error, ValueError) and _is_ours(error) else None
            answers.add({"refused": refused, **describe(error)})
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
    """Lines of JSON on their way to the trainer, several at a time: each one wakes it up."""

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
    """Answers the calls of a job: in order, or, of an async function, several at once."""

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
            started = time.perf_counter()
            try:
                returned = self.reward(_state(arguments))
                if inspect.iscoroutine(returned):
                    returned = run_now(returned)
                result = self._read(returned, arguments)
            except BaseException as error:
                # a function may raise anything, SystemExit included, and the others go on
                result = describe(error)
            self.answers.add({"call": call, "seconds": time.perf_counter() - started, **result})
            self.answers.send_if_due()
        self.answers.send()

    async def _run_together(self, job: Sequence[Mapping[str, Any]]) -> None:
        import asyncio

        async def one(call: int, arguments: Mapping[str, Any]) -> None:
            async with room:
                started = time.perf_counter()
                seconds = self.spec.timeout * len(arguments["completions"])
                limit = asyncio.timeout(seconds)
                try:
                    async with limit:
                        result = self._read(await self.reward(_state(arguments)), arguments)
                except BaseException as error:
                    timed_out = isinstance(error, TimeoutError) and limit.expired()
                    result = {"timeout": seconds} if timed_out else describe(error)
                self.answers.add({"call": call, "seconds": time.perf_counter() - started, **result})
                self.answers.send()

        room = asyncio.Semaphore(self.spec.concurrency)
        await asyncio.gather(*(one(call, arguments) for call, arguments in enumerate(job)))

    def _read(self, returned: object, arguments: Mapping[str, Any]) -> Answer:
        """`scores` has None where a value is no finite number; `cause` is the first such, by its place."""
        scores: list[dict[str, float] | None] = []
        cause: tuple[int, str] | None = None
        for place, value in enumerate(read_values(returned, len(arguments["completions"]))):
            read = read_scores(value, self.name)
            finite = is_finite(read)
            if not finite and cause is None:
                cause = place, f"{value!r:.200}"
            scores.append(read if finite else None)
        return {"scores": scores, "cause": cause}


def describe(error: BaseException) -> Answer:
    """An exception, for the trainer: its kind, what it says, and its traceback from the user's code on."""
    if isinstance(error, WrongReturn):
        return {"wrong": str(error)[:LONGEST_TEXT]}
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__") in OURS:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    # not str(error): an exception's own text may fail
    _, colon, said = traceback.format_exception_only(error)[-1].strip().partition(": ")
    return {
        "raised": f"{type(error).__name__}{colon}{said}"[:LONGEST_TEXT],
        "traceback": text[-LONGEST_TEXT:],
    }


def allow_cpu_seconds(seconds: float) -> None:
    """Lets the process use what all cores can do in `seconds` from here on, and one second.

    The deadline is the trainer's to hold; this ends an endless loop even where nobody holds it.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds * (os.cpu_count() or 1)) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _is_ours(error: BaseException) -> bool:
    """Whether this project raised it, and not the user's module: then its sentence says it all."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    return frames is not None and frames.tb_frame.f_globals.get("__name__") in OURS


def _state(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if "trainer_state" not in arguments:
        return dict(arguments)
    return {**arguments, "trainer_state": SimpleNamespace(**arguments["trainer_state"])}
