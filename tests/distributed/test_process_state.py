"""Processes that have ended are told from those that say nothing."""

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


def test_one_that_runs_or_is_frozen_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    assert not Process.own().has_ended()
    assert not of(child).has_ended()
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(child, "T")
    assert not of(child).has_ended()


def test_one_that_was_killed_has_ended_before_its_parent_asks_and_after(
    child: subprocess.Popen[bytes],
) -> None:
    watched = of(child)
    child.kill()
    wait_for(child, "Z")
    assert watched.has_ended()
    child.wait()
    assert watched.has_ended()


def test_one_that_has_the_number_of_another_does_not_stand_for_it(child: subprocess.Popen[bytes]) -> None:
    assert replace(of(child), started="1").has_ended()


def test_of_another_machine_nothing_is_said(child: subprocess.Popen[bytes]) -> None:
    elsewhere = replace(of(child), place="another machine")
    child.kill()
    child.wait()
    assert not elsewhere.has_ended()


def test_without_a_place_nothing_is_said(
    child: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without /proc: silence alone tells."""
    monkeypatch.setattr(rlhf.liveness, "PROCESSES", tmp_path)
    own = Process.own()
    assert own == Process("", os.getpid(), "")
    assert not own.has_ended()
