"""Tells whether another process of this machine has ended, by /proc and without contacting it.

A killed process sends no more messages, but a frozen or busy one sends none either. The operating system
tells them apart at once: after a process has ended, its id is free, belongs to a later process, or is that of
a zombie.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROCESSES = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, identified so that another one on the same machine can tell whether it has ended.

    Process ids are reused, so the time of its start belongs to the identity.
    """

    place: str
    """Where its id is valid: the boot id of the machine and its PID namespace; "" where these are unknown."""
    number: int
    """The process id."""
    started: str
    """When it started, in clock ticks since the machine booted."""

    @classmethod
    def own(cls) -> Process:
        """The calling process."""
        return cls(_place(), os.getpid(), _state(os.getpid())[1])

    def has_ended(self) -> bool:
        """Whether it has ended; False where that cannot be known, as for a process of another machine."""
        if not self.place or self.place != _place():
            return False
        state, started = _state(self.number)
        # "" is gone, Z a zombie, X dead
        return state in ("", "Z", "X") or started != self.started


def _place() -> str:
    """`Process.place` of the calling process."""
    boot = PROCESSES / "sys" / "kernel" / "random" / "boot_id"
    namespace = PROCESSES / "self" / "ns" / "pid"
    if not (boot.is_file() and namespace.is_symlink()):
        return ""
    return f"{boot.read_text().strip()} {os.readlink(namespace)}"


def _state(number: int) -> tuple[str, str]:
    """State of process `number` (a letter, man 5 proc) and its start; empty strings if it is gone."""
    try:
        text = (PROCESSES / str(number) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    # the second field is the program's name in parentheses, which may itself contain spaces and parentheses
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
