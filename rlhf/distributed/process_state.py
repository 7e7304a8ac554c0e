"""Whether another process of this machine still runs, known without asking it.

A process that was killed says nothing more, but one that is frozen or busy without pause says nothing either.
The system tells them apart at once: its number is gone, belongs to a later one, or waits for its parent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROCESSES = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """`place`: the machine, since it was started, and what numbers its processes ("" where that is unknown).

    `started`: in the machine's own ticks; a number is given again, such a pair is not.
    """

    place: str
    number: int
    started: str

    @classmethod
    def own(cls) -> Process:
        return cls(_place(), os.getpid(), _state(os.getpid())[1])

    def has_ended(self) -> bool:
        """False where that cannot be seen: in a process of another machine or container."""
        if not self.place or self.place != _place():
            return False
        state, started = _state(self.number)
        return state in ("", "Z", "X") or started != self.started


def _place() -> str:
    boot = PROCESSES / "sys" / "kernel" / "random" / "boot_id"
    numbers = PROCESSES / "self" / "ns" / "pid"
    if not (boot.is_file() and numbers.is_symlink()):
        return ""
    return f"{boot.read_text().strip()} {os.readlink(numbers)}"


def _state(number: int) -> tuple[str, str]:
    """Letter of the state (man 5 proc) and start; empty of a process that is gone."""
    try:
        text = (PROCESSES / str(number) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    # the second field is a name in brackets, which may have spaces and brackets in it
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
