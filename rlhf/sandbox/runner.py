"""Runs generated Python code in the sandbox: always with limits, in namespaces where the system allows it.

A program gets no environment variables, an empty folder of its own that is closed to other users, and limits
on time, memory, file size, processes and output; when it ends, everything that it started is ended. In
namespaces it also has no network, sees no other process, and has a root of its own with the interpreter, the
system's libraries and its folder: no data, no sockets, nothing else that it could read or write.

What this does not protect from: without namespaces the program can read and write all that the user can, and
use the network; it can attack the kernel like any program (there is no seccomp filter); and programs can
observe each other through the load of the machine. For hostile programs on a machine that
matters, use a remote sandbox behind `rlhf.rewards.remote:RemoteReward`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf.sandbox.enclosure import LEVELS

LAUNCHER = str(Path(__file__).with_name("enclosure.py"))
OUTPUT_LIMIT = 1 << 24
"""Bytes of output after which a program is ended."""
ERRORS_KEPT = 1 << 16
"""Bytes of errors that are kept; further ones are read and dropped."""
END_SECONDS = 5.0
"""Time limit for the end of a namespace; normally it takes milliseconds."""
PROTECTS = {
    "nobody, namespaces": "no network, other processes invisible, no files but its folder, the interpreter "
    "and the system's libraries, user nobody",
    "namespaces": "no network, other processes invisible, no files but its folder, the interpreter and the "
    "system's libraries",
    "limits only": "limits on time, memory, file size, processes and output. It is NOT kept from reading "
    "and writing what you may read and write, nor from the network, because this system allows no namespaces",
}
"""What each level means for a program, as the log says it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program."""

    seconds: float = 5.0
    memory_mib: int = 512
    processes: int = 32
    file_mib: int = 16


@dataclass(frozen=True, slots=True)
class Result:
    """How one program ended. Example: `Result("", "8\\n", "", 0)`."""

    ended: str
    """Empty if the program ended by itself; else which limit ended it: "time" or "output"."""
    output: str
    errors: str
    status: int
    """Exit status; 0: no error; negative: the signal that killed the program."""


def run_python(code: str, limits: Limits, *, standard_input: str = "", level: str | None = None) -> Result:
    """Runs `code` as a separate program, at isolation `level` or else at the safest one that works here."""
    level = isolation() if level is None else level
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        # mkdtemp closes it to all other users; the user nobody must only find what is mounted on it
        os.chmod(folder, 0o711 if level == LEVELS[0] else 0o700)
        program = os.path.join(folder, "program.py")
        # what is not valid Unicode is an error of the program, not of this function
        with open(program, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(code)
        os.chmod(program, 0o600)
        return _run(program, folder, limits, standard_input, level)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def isolation() -> str:
    """The safest of `LEVELS` that works on this system, found by trying once per process."""
    global _found
    if _found is None:
        probe = "import os; print(os.getcwd()); open('x', 'w').write('y')"
        _found = next(
            (
                level
                for level in LEVELS[:-1]
                if run_python(probe, Limits(seconds=10.0), level=level).status == 0
            ),
            LEVELS[-1],
        )
    return _found


_found: str | None = None


def _run(program: str, folder: str, limits: Limits, standard_input: str, level: str) -> Result:
    # the base interpreter, because the user nobody may not have access to the virtual environment
    python = os.path.realpath(sys.executable)
    settings = {
        "program": program,
        "folder": folder,
        "level": level,
        "seconds": limits.seconds,
        "memory": limits.memory_mib << 20,
        "processes": limits.processes,
        "file": limits.file_mib << 20,
        "python": python,
    }
    with tempfile.TemporaryFile() as input_file:
        input_file.write(standard_input.encode(errors="surrogatepass"))
        input_file.seek(0)
        launcher = subprocess.Popen(
            [python, "-I", "-S", LAUNCHER, json.dumps(settings)],
            stdin=input_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        return _watch(launcher, time.monotonic() + limits.seconds, level)


def _watch(program: subprocess.Popen[bytes], deadline: float, level: str) -> Result:
    """Reads the program's output up to the limit and waits; then ends it with all that it started.

    Without namespaces only its process group is ended: a process that has left the group lives on until the
    worker's keeper (rlhf/rewards/workers/keeper.py) ends it with the worker.
    """
    assert program.stdout is not None and program.stderr is not None
    output, errors = program.stdout.fileno(), program.stderr.fileno()
    pipes = {output: bytearray(), errors: bytearray()}
    still_open, ended = set(pipes), ""
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
    try:
        while still_open and not ended:
            for pipe, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                some = os.read(pipe, 1 << 14)
                if pipe == output or len(pipes[pipe]) < ERRORS_KEPT:
                    pipes[pipe] += some
                if not some:
                    poll.unregister(pipe)
                    still_open.discard(pipe)
                if len(pipes[output]) > OUTPUT_LIMIT:
                    ended = "output"
            if time.monotonic() >= deadline:
                ended = "time"
        if not ended:
            program.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        ended = "time"
    finally:
        status = _end(program, level)
        program.stdout.close()
        program.stderr.close()
    printed = bytes(pipes[output][:OUTPUT_LIMIT]).decode(errors="replace")
    complaints = bytes(pipes[errors][:ERRORS_KEPT]).decode(errors="replace")
    return Result(ended, printed, complaints, status)


def _end(launcher: subprocess.Popen[bytes], level: str) -> int:
    """Ends the program; returns its status. In namespaces the launcher does it on SIGTERM."""
    if level != LEVELS[-1]:
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return launcher.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.wait()
