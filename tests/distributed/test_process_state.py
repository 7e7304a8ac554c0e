"""Processes that have ended are told apart from those that are only silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

import rlhf.distributed.process_state
from rlhf.distributed.process_state import Process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="there is no /proc here")


@pytest.fixture
def child() -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def of(process: subprocess.Popen[bytes]) -> Process:
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(Process.own(), number=process.pid, started=started)


def state(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(process: subprocess.Popen[bytes], wanted: str) -> None:
    deadline = time.monotonic() + 60
    while state(process) != wanted:
        assert time.monotonic() < deadline, f"it is {state(process)}, not {wanted}"
        time.sleep(0.02)


def test_a_process_that_runs_or_is_frozen_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    assert not Process.own().has_ended()
    assert not of(child).has_ended()
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(child, "T")
    assert not of(child).has_ended()


def test_a_killed_process_has_ended_before_and_after_its_parent_waits_for_it(
    child: subprocess.Popen[bytes],
) -> None:
    watched = of(child)
    child.kill()
    wait_for(child, "Z")
    assert watched.has_ended()
    child.wait()
    assert watched.has_ended()


def test_a_later_process_with_the_same_number_is_another_one(child: subprocess.Popen[bytes]) -> None:
    assert replace(of(child), started="1").has_ended()


def test_a_process_of_another_machine_is_not_said_to_have_ended(child: subprocess.Popen[bytes]) -> None:
    elsewhere = replace(of(child), place="another machine")
    child.kill()
    child.wait()
    assert not elsewhere.has_ended()


def test_without_proc_no_process_is_said_to_have_ended(
    child: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a system without /proc, no process is known to have ended."""
    monkeypatch.setattr(rlhf.distributed.process_state, "PROCESSES", tmp_path)
    own = Process.own()
    assert own == Process("", os.getpid(), "")
    assert not own.has_ended()
