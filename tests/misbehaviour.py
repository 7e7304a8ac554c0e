"""What functions of rewards and of environments do wrong in the same way, for both files hostile.py."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress


def opened() -> list[int]:
    """Every descriptor but the standard ones; the trainer may have hundreds, so that numbers are large."""
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]


def send_everywhere(data: bytes) -> None:
    """Writes to every open socket, as a library with a bug might."""
    for number in opened():
        with suppress(OSError):
            socket.socket(fileno=os.dup(number)).sendall(data)


def exit_politely() -> None:
    sys.exit("enough")


def interrupt() -> None:
    raise KeyboardInterrupt


def raise_what_cannot_be_printed() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise Unprintable


def raise_megabytes() -> None:
    raise ValueError("z" * (1 << 24))


def raise_base_exception() -> None:
    raise BaseException("not an Exception")
