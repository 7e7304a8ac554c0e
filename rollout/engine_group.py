"""Several engines as one: the policy's, and embedded ones over frozen models, each for its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlhf.metrics import Metrics
from rlhf.rollout.engine import (
    KeepsSamples,
    Measured,
    PauseMode,
    RolloutEngine,
    RolloutRequest,
    SyncReport,
    WeightSource,
)
from rlhf.types import Completion, Source


class EngineGroup:
    """A `RolloutEngine` that hands each request to the engine of its `source`.

    Engines of other sources than the policy are made when the first request for them comes, and sample in
    this process while servers of the policy decode elsewhere.
    """

    def __init__(self, policy: RolloutEngine, others: Mapping[Source, Callable[[], RolloutEngine]]) -> None:
        """`others`: what makes the engine of each further source. They sample from models of this process,
        whose weights may change after `release`, which frees whatever was derived from them.
        """
        self.policy, self._start = policy, dict(others)
        self._others: dict[Source, RolloutEngine] = {}
        self._in_flight: dict[Source, int] = {}
        """Number of samples that each engine has not returned yet."""
        self._aborted = False

    def engine(self, source: Source) -> RolloutEngine:
        """The engine of a source, which is made if it has to be. Raises what making it raises."""
        if source == Source.POLICY:
            return self.policy
        if source not in self._others:
            self._others[source] = self._start[source]()
        return self._others[source]

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        for source in (Source.POLICY, *self._start):
            own = [r for r in requests if r.source == source]
            if own:
                self.engine(source).submit(own)
                self._in_flight[source] = self._in_flight.get(source, 0) + sum(r.params.n for r in own)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """Completions of one engine: of an embedded one as long as it has samples in flight."""
        if self._aborted:
            # those of all engines: nobody polls for the rest of a rollout that was given up
            self._aborted, self._in_flight = False, {}
            return [completion for engine in self._all() for completion in engine.poll(0.0)]
        for source in (*self._others, Source.POLICY):
            if self._in_flight.get(source):
                polled = self.engine(source).poll(timeout)
                self._in_flight[source] -= len(polled)
                return polled
        return []

    def pause(self, mode: PauseMode) -> None:
        for engine in self._all():
            engine.pause(mode)
        if mode == "abort":
            self._aborted = True

    def resume(self) -> None:
        for engine in self._all():
            engine.resume()

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """The report is of the policy's engine; a mixture samples from the learner's own module."""
        if Source.MIXTURE in self._others:
            self._others[Source.MIXTURE].update_weights(source, version)
        return self.policy.update_weights(source, version)

    def release(self) -> None:
        for engine in self._all():
            engine.release()

    def close(self) -> None:
        for engine in self._all():
            engine.close()

    def forget(self, sample: tuple[str, int]) -> None:
        for engine in self._all():
            if isinstance(engine, KeepsSamples):
                engine.forget(sample)

    def measured(self) -> Metrics:
        """The metrics of the policy's engine."""
        return self.policy.measured() if isinstance(self.policy, Measured) else {}

    def _all(self) -> tuple[RolloutEngine, ...]:
        return self.policy, *self._others.values()
