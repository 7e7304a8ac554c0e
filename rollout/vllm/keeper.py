"""Keeps one vLLM server: `python -m rlhf.rollout.vllm.keeper PARENT FOLDER ARGUMENTS...`.

The server and the processes it starts are a group of their own. The group ends when the keeper is told to
end, when the server does, and when the trainer is gone, however it went: nobody has to be asked for that, a
keeper whose parent changes knows. FOLDER is shared memory of the trainer and then goes too.
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

LOOK_EVERY, PATIENCE = 0.25, 5.0
"""Seconds: between two looks at the parent, and for the server to end by itself."""
PR_SET_PDEATHSIG = 1


class _Told(Exception):
    """To end."""


def main(parent: int, folder: str, arguments: list[str]) -> int:
    def told(number: int, frame: FrameType | None) -> None:
        raise _Told

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    command = [sys.executable, "-m", "rlhf.rollout.vllm.serve", *arguments]
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_the_keeper)
    try:
        while server.poll() is None and os.getppid() == parent:
            time.sleep(LOOK_EVERY)
    except _Told:
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
    """Everything in its group, a process that is stopped included."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        try:
            server.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
