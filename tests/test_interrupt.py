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
