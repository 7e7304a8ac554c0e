"""Where a worker is: four numbers in memory that it shares with the trainer.

So a worker need not send each answer by itself, and yet the trainer knows, when it waits too long, which call
is under way and since when. A worker in another mood may write anything here; it is read with that in mind.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

PLACE = struct.Struct("=qqd")


class Progress:
    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: of the other side's; not given: makes one."""
        self.descriptor = os.memfd_create("progress") if descriptor is None else descriptor
        if descriptor is None:
            os.truncate(self.descriptor, mmap.PAGESIZE)
        self._shared = mmap.mmap(self.descriptor, mmap.PAGESIZE)

    def begin(self, job: int, call: int) -> None:
        PLACE.pack_into(self._shared, 0, job, call, time.monotonic())

    def under_way(self, job: int) -> tuple[int, float] | None:
        """Number and beginning of the call under way; None: the job has not begun."""
        of, call, since = PLACE.unpack_from(self._shared)
        return (call, since) if of == job else None

    def close(self) -> None:
        self._shared.close()
        os.close(self.descriptor)
