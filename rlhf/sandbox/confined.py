"""Calls a verifier of a third party in a process of its own, which can change nothing and then ends.

A library that judges what a policy wrote may evaluate it. In the process of a reward function such text could
read the environment, or replace the function that scores the samples after it. Here it finds no environment
variables, no open files, and, where the system allows namespaces, no network and nothing that it could write.
Whatever it changes in memory ends with the process, which judges one sample.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable
from typing import NoReturn

from rlhf.sandbox.enclosure import LEVELS, PR_SET_PDEATHSIG, enter_namespaces, make_read_only
from rlhf.sandbox.runner import isolation

LONGEST_TEXT = 2000


class VerifierError(RuntimeError):
    """A verifier raised an exception, or its process ended without a score."""


def call_confined(verify: Callable[[], float]) -> float:
    """What `verify` returns, called in a fork of this process.

    There is no time limit of its own: the deadline of the sample ends the worker with all its processes.
    Raises VerifierError: `verify` raised something, or its process was killed.
    """
    # found before the fork, so that it is looked for once and not in each child
    level = isolation()
    answer, childs_answer = os.pipe()
    child = os.fork()
    if child == 0:
        _judge(verify, childs_answer, level)
    os.close(childs_answer)
    with os.fdopen(answer, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        raise VerifierError(f"the verifier's process ended with status {os.waitstatus_to_exitcode(status)}")
    score, raised = json.loads(text)
    if raised is not None:
        raise VerifierError(raised)
    return float(score)


def _judge(verify: Callable[[], float], answer: int, level: str) -> NoReturn:
    """In the child: gives up what the text that is judged must not reach, and writes the score."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.closerange(3, answer)
        os.closerange(answer + 1, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        if level != LEVELS[-1]:
            enter_namespaces(libc)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            make_read_only(libc)
        try:
            outcome = [float(verify()), None]
        except BaseException as error:
            # text that is evaluated may raise anything
            outcome = [0.0, f"{type(error).__name__}: {error}"[:LONGEST_TEXT]]
        os.write(answer, json.dumps(outcome).encode())
        os._exit(0)
    finally:
        os._exit(1)
