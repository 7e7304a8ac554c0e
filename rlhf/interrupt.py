"""Ctrl-C, SIGTERM and SIGHUP: the first saves and ends the run before the next update, a second ends it at
once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_PRESS = 1.0
"""Seconds within which several signals count as one: the terminal sends Ctrl-C to every process, and a
parent such as `timeout` sends it to its child again."""


class Interrupted(Exception):
    """The run was asked to stop. It stops before an update, never within one."""


class Interrupt:
    """In this context signals only request a stop; `check` raises Interrupted where it is safe.

    SIGHUP comes when the terminal is closed; where it is ignored, as under `nohup`, it stays ignored. In a
    thread other than the main one there is no such context: signals do what they did before.
    """

    def __init__(self, announce: Callable[[str], None], *, alone: bool) -> None:
        """`announce` shows a text to the user. `alone`: this is the only rank.

        With several ranks `check` never raises: one rank that stopped by itself would leave the others
        waiting in a collective. `rlhf.loop.Loop.agree_to_stop` stops all of them together.
        """
        self.announce, self.alone = announce, alone
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> Interrupt:
        # Python lets only its main thread handle signals; a run in another one leaves them to the program
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # a terminal that closes may send several SIGHUP: nobody asks for an end without saving
            if number != signal.SIGHUP and time.monotonic() - self._since > ONE_PRESS:
                raise KeyboardInterrupt
            return
        self.requested, self._since = True, time.monotonic()
        self.announce(
            f"{signal.Signals(number).name}: the run is saved and ends before the next update; "
            "a second signal ends it at once, without saving"
        )

    def check(self) -> None:
        """Raises Interrupted if a signal came and this is the only rank."""
        if self.requested and self.alone:
            raise Interrupted
