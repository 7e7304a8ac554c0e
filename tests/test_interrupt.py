"""The first signal requests a stop, a later one ends the run; signals at the same moment count as one."""

from __future__ import annotations

import os
import signal

import pytest

from rlhf import interrupt
from rlhf.interrupt import ONE_PRESS, Interrupt, Interrupted


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], list[str]()
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    with Interrupt(said.append, alone=True) as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += ONE_PRESS / 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(said) == 1 and said[0].startswith("SIGINT: the run is saved")
        with pytest.raises(Interrupted):
            stop.check()
        clock[0] += ONE_PRESS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_terminal_that_closes_asks_for_an_end_with_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], list[str]()
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupt(said.append, alone=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            clock[0] += 2 * ONE_PRESS
            os.kill(os.getpid(), signal.SIGHUP)
            assert said[0].startswith("SIGHUP: the run is saved")
            with pytest.raises(Interrupted):
                stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(lambda text: None, alone=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)
