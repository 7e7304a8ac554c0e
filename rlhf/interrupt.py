"""Ctrl-C and SIGTERM end a run between two updates, with everything saved; a second one ends it at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_PRESS = 1.0
"""Seconds in which signals are one: `timeout` and others pass on what the terminal has sent to all."""


class Interrupted(Exception):
    """The run was asked to stop. Nothing of the step under way has reached the weights."""


class Interrupt:
    """While the context lasts, a signal is a request, answered where `check` is called."""

    def __init__(self, announce: Callable[[str], None], *, alone: bool) -> None:
        """`alone`: there are no other ranks, which would wait for this one in their next collective."""
        self.announce, self.alone = announce, alone
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._since > ONE_PRESS:
                raise KeyboardInterrupt
            return
        self.requested, self._since = True, time.monotonic()
        self.announce(
            f"{signal.Signals(number).name}: the run is saved and left before the next update; "
            "once more: at once"
        )

    def check(self) -> None:
        """Raises Interrupted if a signal came, and no other rank has to agree to it first."""
        if self.requested and self.alone:
            raise Interrupted
