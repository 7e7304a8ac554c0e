"""Reward functions that misbehave when the completion names a misbehaviour, and return 1 otherwise."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import misbehaviour
from tests.misbehaviour import send_everywhere

SLEEPER = "import time; time.sleep(600)"


def loop() -> None:
    while True:
        pass


def loop_in_c() -> None:
    """An endless loop in C code, which never releases the interpreter lock."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def loop_ignoring_signals() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    loop()


def sleep() -> None:
    time.sleep(600)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def deadlock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def read_standard_input() -> None:
    sys.stdin.readline()
    time.sleep(600)


def memory_hog() -> None:
    held = [bytearray(1 << 27) for _ in range(64)]
    time.sleep(600)
    del held


def memory_hog_of_children() -> None:
    """Starts processes that each keep the memory limit, but not together."""
    grow = "import time; held = bytearray(100 << 20); time.sleep(600)"
    children = [subprocess.Popen([sys.executable, "-c", grow]) for _ in range(6)]
    for child in children:
        child.wait()


def recursion() -> None:
    recursion()


def stack_overflow_in_c() -> None:
    nested: Any = ()
    for _ in range(1 << 20):
        nested = (nested,)
    hash(nested)


def fork_bomb() -> None:
    """A fork bomb with a bound, so that a failing test does not take down the machine."""
    for _ in range(9):
        os.fork()
    time.sleep(600)


def fork_bomb_in_sessions() -> None:
    for _ in range(9):
        if os.fork() == 0:
            os.setsid()
    time.sleep(600)


def orphan() -> None:
    """Leaves a grandchild without parent in a session of its own, which holds the worker's output open."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", SLEEPER])
        os._exit(0)
    os.wait()
    loop()


def segfault() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def exit_at_once() -> None:
    os._exit(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_its_keeper() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def kill_its_group() -> None:
    os.killpg(0, signal.SIGKILL)


def print_megabytes() -> None:
    for _ in range(64):
        sys.stdout.write("x" * (1 << 16))
        os.write(2, b"y" * (1 << 16))
    raise ValueError("enough written")


def close_every_file() -> None:
    os.closerange(0, 1 << 16)


def garble_the_connection() -> None:
    """Writes to every open socket, as a library with a bug might."""
    send_everywhere(b"\xff\xfe no answer\n")


def forge_an_answer() -> None:
    send_everywhere(b'{"call": 7, "seconds": 0, "scores": [{"bad": 9}]}\n')


def flood_the_connection() -> None:
    send_everywhere(b"z" * (1 << 25))


def leak_threads() -> None:
    for _ in range(32):
        threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
    sys.exit(1)


def lower_its_limits() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 20, 1 << 20))
    held = [str(i) * 100 for i in range(1 << 20)]
    del held


def remove_its_folder() -> None:
    os.rmdir(Path.cwd())
    Path("notes.txt").write_text("lost")


def disable_everything() -> None:
    gc.disable()
    sys.modules.clear()
    raise ValueError("after clearing the modules")


BEHAVIOURS: dict[str, Callable[[], None]] = {
    value.__name__: value
    for value in (*vars(misbehaviour).values(), *globals().values())
    if inspect.isfunction(value)
}


def misbehave(completions: Sequence[str]) -> list[float]:
    """Does what the completion names."""
    for text in completions:
        if text in BEHAVIOURS:
            BEHAVIOURS[text]()
    return [1.0] * len(completions)


async def misbehave_async(completions: Sequence[str]) -> list[float]:
    for text in completions:
        if text == "wait":
            await asyncio.sleep(600)
        if text in BEHAVIOURS:
            BEHAVIOURS[text]()
        await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def surroundings(completions: Sequence[str], file: str) -> list[float]:
    """Writes the environment of the worker to a file."""
    seen = {
        "cwd": str(Path.cwd()),
        "environment": dict(os.environ),
        "data_limit": resource.getrlimit(resource.RLIMIT_DATA)[0],
        "is_main_thread": threading.current_thread() is threading.main_thread(),
        "torch": "torch" in sys.modules,
    }
    Path(file).write_text(json.dumps(seen))
    return [1.0] * len(completions)


VALUES: dict[str, Any] = {
    "nan": float("nan"),
    "infinite": float("-inf"),
    "huge": 10**400,
    "beyond float32": -1e39,
    "none": None,
    "empty dict": {},
    "dict of none": {"bad": None},
    "nan in dict": {"good": 1.0, "bad": float("nan")},
    "text": "good",
    "bytes": b"1",
    "complex": 1j,
    "nested": [1.0],
    "object": object(),
    "number as key": {1: 1.0},
    "text in dict": {"bad": "1"},
}


def values(completions: Sequence[str]) -> list[Any]:
    return [VALUES.get(text, 1.0) for text in completions]


SHAPES: dict[str, Any] = {
    "too many": [1.0, 1.0],
    "none at all": [],
    "a number": 1.0,
    "nothing": None,
    "a text": "1.0",
    "a set": {1.0},
    "a dict": {"good": 1.0},
    "an iterator": iter([1.0]),
}


def shapes(completions: Sequence[str]) -> Any:
    return SHAPES.get(completions[0], [1.0])


_KEPT: list[bytearray] = []


def leak(completions: Sequence[str]) -> list[float]:
    """Keeps 100 MiB of each call."""
    _KEPT.append(bytearray(100 << 20))
    return [float(len(text)) for text in completions]


def leak_untouched(completions: Sequence[str]) -> list[float]:
    """Needs more than there is, in each call."""
    return [float(len(bytearray(1 << 34))) for _ in completions]
