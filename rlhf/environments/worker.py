"""The process's side: holds instances of environments and carries out what the trainer asks of them.

Each instance has a thread of its own from its first call to its last, so a tool that sleeps holds up no other
episode, an instance is never entered twice, and what belongs to a thread (a connection of sqlite3) can be
kept in it. What is awaited runs in one event loop for all. Functions of different instances therefore run at
the same time: what they share (globals, class attributes, files) must be safe for that, and what belongs to
the main thread (signals, alarms) is not available. With `isolation: episode` a process has one instance.

A request is a pickle `(call, do, episode, arguments)`; an answer is a line of JSON (`wire.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import inspect
import json
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any, cast

from rlhf.environments.loading import Environment, load
from rlhf.environments.observations import WrongAnswer
from rlhf.environments.protocol import Ending, Lost
from rlhf.environments.randomness import give_each_episode_its_own
from rlhf.environments.shapes import Abandoned, Episode
from rlhf.environments.spec import EnvironmentSpec
from rlhf.environments.wire import Outcome, written
from rlhf.rewards.workers.return_values import WrongReturn
from rlhf.rewards.workers.worker import describe

STACK_BYTES = 4 << 20
"""Stack of a thread. Threads are many, and their stacks count as memory of the process."""
STOP_SECONDS = 0.3
"""How long a thread whose episode is abandoned has to end."""
LONGEST_STACK = 8000
"""Characters of a stack that are sent."""
OURS = ("rlhf.environments.", "rlhf.rewards.", "rlhf.plugins", "concurrent.futures")
"""Modules whose frames are left out of tracebacks."""


def serve(connection: int, folder: str) -> None:
    """Loads the environments and serves them until the other end of the socket `connection` is closed.

    They are imported in the folder where the run was started and called in `folder`, as reward functions are.
    """
    os.set_inheritable(connection, False)
    with socket.socket(fileno=connection) as trainer, trainer.makefile("rb") as requests:
        answers = Answers(trainer)
        spec: EnvironmentSpec = pickle.load(requests)
        environments = loaded(lambda: load(spec), folder, answers)
        if environments is None:
            return
        answers.send_object({"ready": described(environments)})
        worker = Worker(environments, answers)
        while True:
            try:
                request = pickle.load(requests)
            except EOFError:
                return
            worker.take(*request)


def loaded(
    load: Callable[[], dict[str, Environment]], folder: str, answers: Answers
) -> dict[str, Environment] | None:
    """The environments; if one cannot be loaded, the trainer is told why, and None is returned."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    threading.stack_size(STACK_BYTES)
    # before the user's module may write `from random import randint`
    give_each_episode_its_own()
    try:
        environments = load()
        os.chdir(folder)
        # numpy is imported now, if it is used
        give_each_episode_its_own()
    except BaseException as error:
        # the user's module may raise anything when it is imported; the trainer must learn of it
        answers.send_object({"refused": _refusal(error), **describe(error, _is_ours)})
        return None
    return environments


def described(environments: Mapping[str, Environment]) -> list[dict[str, Any]]:
    """What the trainer must know of the environments."""
    return [
        {
            "name": environment.name,
            "schemas": environment.schemas,
            "by_function": {
                f"{environment.name if name in environment.methods else ''}.{name}": schema
                for name, (_, schema) in environment.tools.items()
            },
            "requires": environment.requires,
            "gives_rewards": environment.gives_rewards,
        }
        for environment in environments.values()
    ]


class Answers:
    """Sends lines to the trainer, from any thread."""

    def __init__(self, trainer: socket.socket) -> None:
        self.trainer, self._lock = trainer, threading.Lock()

    def send(self, line: bytes) -> None:
        try:
            with self._lock:
                self.trainer.sendall(line)
        except OSError:
            # without its connection the process is of no use, and nobody sees an exception in a thread
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def send_object(self, answer: dict[str, Any]) -> None:
        self.send(json.dumps(answer).encode() + b"\n")


class Loop:
    """The event loop for all that is awaited; its thread starts when something is."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._lock = threading.Lock()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(target=self._loop.run_forever, daemon=True)
                thread.start()
                self._thread = thread.ident or 0
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def is_free(self) -> bool:
        """Whether it goes round: a function in it that blocks holds up all others."""
        if self._loop is None:
            return True
        went_round = threading.Event()
        self._loop.call_soon_threadsafe(went_round.set)
        return went_round.wait(STOP_SECONDS)

    def stack(self) -> str:
        """Where it is now."""
        return _stack_of(self._thread)


class Instance:
    """One episode, with its thread."""

    def __init__(
        self, environment: Environment, answers: Answers, loop: Loop, forget: Callable[[], object]
    ) -> None:
        """`forget` is called when the thread ends."""
        self.environment, self.answers, self.loop, self.forget = environment, answers, loop, forget
        self.calls: queue.SimpleQueue[tuple[int, str, dict[str, Any]] | None] = queue.SimpleQueue()
        self.is_abandoned = False
        self.awaited: Future[Any] | None = None
        self.coroutine: Any = None
        """What is awaited."""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        """Carries out the calls of the episode, until its end."""
        try:
            self._serve()
        finally:
            self.forget()
            self.ended.set()

    def _serve(self) -> None:
        episode: Episode | None = None
        while (request := self.calls.get()) is not None and not self.is_abandoned:
            call, do, arguments = request
            outcome: Outcome
            try:
                if do == "begin":
                    episode, outcome = self.environment.begin(
                        arguments["columns"], arguments["seed"], self._wait
                    )
                else:
                    assert episode is not None
                    outcome = episode.respond(arguments["messages"]) if do == "respond" else episode.end()
                line = written(call, outcome, self.environment.name)
            except BaseException as error:
                # an environment may raise anything, even SystemExit
                line = written(call, outcome := self._lost(error), self.environment.name)
            if self.is_abandoned:
                return
            self.answers.send(line)
            if isinstance(outcome, Lost | Ending):
                return

    def _wait(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        self.coroutine, self.awaited = value, self.loop.start(_awaiting(value))
        try:
            return self.awaited.result()
        finally:
            self.awaited = None
            if self.is_abandoned:
                raise Abandoned

    def _lost(self, error: BaseException) -> Lost:
        name = self.environment.name
        if isinstance(error, WrongReturn | WrongAnswer):
            return Lost("value", f"environment {name}: {error}"[:4000])
        described = describe(error, _is_ours)
        kind = "memory" if isinstance(error, MemoryError) else "exception"
        return Lost(kind, f"environment {name} raised {described['raised']}", described["traceback"])

    def abandon(self, number: int) -> None:
        """Ends the thread, whose call has taken too long, and tells the trainer whether it could be ended.

        A loop in Python and what is awaited can be ended. A function that does not return to Python cannot;
        its thread is left behind.
        """
        self.is_abandoned = True
        awaited, coroutine, thread = self.awaited, self.coroutine, self.thread.ident or 0
        stack = _stack_of(thread) if awaited is None else _stack_of_coroutine(coroutine)
        self.calls.put(None)
        if awaited is not None:
            awaited.cancel()
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Abandoned))
        has_ended = self.ended.wait(STOP_SECONDS)
        is_stuck = awaited is not None and not self.loop.is_free()
        self.answers.send_object(
            {
                "abandoned": number,
                "ended": has_ended,
                "stuck": is_stuck,
                "stack": (self.loop.stack() if is_stuck else stack)[-LONGEST_STACK:],
            }
        )


class Worker:
    """Hands requests to instances; the main thread does no more, so it can always be reached."""

    def __init__(
        self, environments: Mapping[str, Environment], answers: Answers, is_alone: bool = False
    ) -> None:
        self.environments, self.answers, self.loop = environments, answers, Loop()
        self.instances: dict[int, Instance] = {}
        self._alone: queue.SimpleQueue[Instance] | None = queue.SimpleQueue() if is_alone else None

    def take(self, call: int, do: str, number: int, arguments: dict[str, Any]) -> None:
        if do == "begin":
            environment = self.environments[arguments["name"]]
            forget = partial(self.instances.pop, number, None)
            instance = Instance(environment, self.answers, self.loop, forget)
            if self._alone is not None:
                self._alone.put(instance)
            elif not self._starts(call, instance):
                return
            self.instances[number] = instance
        instance = self.instances.get(number)
        if instance is None:
            return
        if do == "abandon":
            threading.Thread(target=instance.abandon, args=(number,), daemon=True).start()
        else:
            instance.calls.put(None if do == "drop" else (call, do, arguments))

    def _starts(self, call: int, instance: Instance) -> bool:
        """Starts the thread of an instance; if there is no memory for one, its episode is lost."""
        try:
            instance.thread.start()
        except RuntimeError as error:
            name = instance.environment.name
            lost = Lost("memory", f"environment {name}: no thread for one more episode: {error}")
            self.answers.send(written(call, lost, name))
            return False
        return True

    def run_alone(self) -> None:
        """Carries the only episode out in this thread, when it begins."""
        assert self._alone is not None
        instance = self._alone.get()
        instance.thread = threading.current_thread()
        instance.run()
        # the process ends when the trainer has heard how the episode ended, and closes the connection
        threading.Event().wait()


def _is_ours(module: str) -> bool:
    return module.startswith(OURS)


def _stack_of(thread: int) -> str:
    """The frames of a thread that are not ours."""
    frames: dict[int, FrameType] = cast(Any, sys)._current_frames()
    frame, lines = frames.get(thread), list[str]()
    while frame is not None and not _is_ours(str(frame.f_globals.get("__name__"))):
        lines = traceback.format_stack(frame, 1) + lines
        frame = frame.f_back
    return "".join(lines)


def _stack_of_coroutine(coroutine: Any) -> str:
    """Where a coroutine, and each that it awaits, is suspended."""
    lines: list[str] = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        lines += traceback.format_stack(frame, 1)
        coroutine = coroutine.cr_await
    return "".join(lines)


async def _awaiting(value: Any) -> Any:
    return await value


def _refusal(error: BaseException) -> str | None:
    """The message of an error that this project raised, which is enough; None for the user's module's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_ours = bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("rlhf.")
    return str(error) if isinstance(error, ValueError) and is_ours else None
