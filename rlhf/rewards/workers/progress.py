"""Shared memory in which a worker notes the call under way, so that the trainer can enforce its deadline.

It holds three numbers: the job, the call within it, and when the call began. With them a worker can send
several answers at once, and the trainer still knows, when it waits too long, which call is under way and
since when. A misbehaving reward function may write anything here, so the reader must not trust the numbers.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

PLACE = struct.Struct("=qqd")


class Progress:
    """The call under way in one worker: the worker calls `begin`, the trainer `under_way`."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: of the memory that the other process has made; None makes new memory."""
        self.descriptor = os.memfd_create("progress") if descriptor is None else descriptor
        if descriptor is None:
            os.truncate(self.descriptor, mmap.PAGESIZE)
        self._shared = mmap.mmap(self.descriptor, mmap.PAGESIZE)

    def begin(self, job: int, call: int) -> None:
        PLACE.pack_into(self._shared, 0, job, call, time.monotonic())

    def under_way(self, job: int) -> tuple[int, float] | None:
        """Number of the call under way and when it began (monotonic seconds); None: `job` has not begun."""
        noted_job, call, since = PLACE.unpack_from(self._shared)
        return (call, since) if noted_job == job else None

    def close(self) -> None:
        self._shared.close()
        os.close(self.descriptor)
