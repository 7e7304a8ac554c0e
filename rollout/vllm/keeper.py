"""The keeper process of one vLLM server: starts the server and ends it when the trainer dies.

Run as `python -m rlhf.rollout.vllm.keeper PARENT FOLDER ARGUMENTS...`, with the trainer's process id and the
arguments of `serve.py`. The server and the processes that it starts are a process group, which the keeper
ends when it is asked to stop (SIGTERM), when the server ends, and when its parent, the trainer, has ended in
any way. In the last case it also deletes FOLDER, the trainer's folder in shared memory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType

POLL_INTERVAL, END_TIMEOUT = 0.25, 5.0
"""Seconds between two checks of the parent, and seconds that the server has to end after a signal."""
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class _StopRequested(Exception):
    """The keeper was asked to stop by a signal."""


def main(parent: int, folder: str, arguments: list[str]) -> int:
    def request_stop(number: int, frame: FrameType | None) -> None:
        raise _StopRequested

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    command = [sys.executable, "-m", "rlhf.rollout.vllm.serve", *arguments]
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_the_keeper)
    try:
        while server.poll() is None and os.getppid() == parent:
            time.sleep(POLL_INTERVAL)
    except _StopRequested:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _end(server)
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    return server.returncode or 0


def _die_with_the_keeper() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends all processes of the server's group, by SIGKILL if they do not react (such as stopped ones)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(timeout=END_TIMEOUT)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
