"""A rollout engine that is started by the first request and closed when it is released (offline runs).

Runs that learn from data need completions only for evaluations and for learning V(prompt); if they have
neither, no engine is ever started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf.rollout.engine import PauseMode, RolloutEngine, RolloutRequest, SyncReport, WeightSource
from rlhf.sync.weight_sync import WeightSync
from rlhf.types import Completion


class EngineOnDemand:
    """A `RolloutEngine` that calls `start` for the real engine at the first request.

    `sync` then sends the current weights to it and checks them.
    """

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
        """Closes a running engine; the next one is started with the weights of `version`."""
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
    """The weight sync of an `EngineOnDemand`: weights are sent and checked only when an engine is started."""

    def __init__(self, sync: WeightSync) -> None:
        self._sync, self.prompt, self.tolerance = sync, sync.prompt, sync.tolerance

    def push(self, engine: RolloutEngine, version: int) -> SyncReport:
        return engine.update_weights(self._sync, version)
