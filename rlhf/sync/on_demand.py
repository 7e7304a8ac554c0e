"""A rollout engine that is started by the first request and gone after the next release.

For runs that learn from data: without an evaluation, or a value that needs completions, none is ever started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf.rollout.engine import PauseMode, RolloutEngine, RolloutRequest, SyncReport, WeightSource
from rlhf.sync.weight_sync import WeightSync
from rlhf.types import Completion


class EngineOnDemand:
    """Stands for an engine; `start` makes the real one, which `sync` then hands the weights and probes."""

    def __init__(self, start: Callable[[], RolloutEngine], sync: WeightSync) -> None:
        self._start, self._sync = start, sync
        self._engine: RolloutEngine | None = None
        self._version = 0

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        if self._engine is None:
            self._engine = self._start()
            self._sync.push(self._engine, self._version)
        self._engine.submit(requests)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        return [] if self._engine is None else self._engine.poll(timeout)

    def pause(self, mode: PauseMode) -> None:
        if self._engine is not None:
            self._engine.pause(mode)

    def resume(self) -> None:
        if self._engine is not None:
            self._engine.resume()

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """An engine that is running is given up; the next one starts with these weights."""
        self.close()
        self._version = version
        return SyncReport(version, seconds=0.0, bytes=0)

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None


class SyncOnDemand:
    """The weight sync of such an engine: it hands over and probes when one is started, not before."""

    def __init__(self, sync: WeightSync) -> None:
        self._sync = sync

    def push(self, engine: RolloutEngine, version: int) -> SyncReport:
        return engine.update_weights(self._sync, version)
