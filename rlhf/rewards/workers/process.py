"""The trainer's side of one worker process: sends calls of a reward function and holds their deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.plugins import absolute
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.signature import Signature
from rlhf.rewards.workers.kept import NO_ANSWER, KeptProcess
from rlhf.rewards.workers.progress import Progress


class WorkerProcess(KeptProcess):
    """A process that runs one reward function, one call after the other; an async one several at once."""

    def __init__(self, name: str, spec: RewardSpec, log: Callable[[str], None]) -> None:
        # the path must be absolute, because the worker runs in a folder of its own
        spec = replace(spec, path=absolute(spec.path))
        self.name, self.spec = name, spec
        self._progress = Progress()
        self._job = 0
        self.has_answered = False
        """Whether it has answered a call, so that what it holds may be of earlier calls."""
        serve = "rlhf.rewards.workers.worker:serve"
        super().__init__(spec, log, serve, (name, spec), (self._progress.descriptor,))

    def ready(self) -> Signature:
        """Waits until the function is loaded; returns its signature. Raises StartError, with the reason."""
        fields = self.first_answer(f"{self.spec.kind} {self.name}")["ready"]
        return Signature(
            accepts=None if fields["accepts"] is None else tuple(fields["accepts"]),
            requires=tuple(map(tuple, fields["requires"])),
            is_async=fields["is_async"],
            is_class=fields["is_class"],
            may_read=tuple(fields["may_read"]),
            compares=fields["compares"],
            gives_steps=fields["gives_steps"],
        )

    def run(self, calls: Sequence[Mapping[str, Any]], *, is_async: bool) -> Iterator[tuple[int, Any]]:
        """Yields number and answer of each call as they arrive. Raises WorkerLost; the process is then gone.

        The deadline of a call is `timeout` seconds per sample after it began. For an async function the
        worker itself enforces these deadlines, and the trainer only intervenes a second later.
        """
        self._job += 1
        self.send((self._job, calls))
        seconds = [self.spec.timeout * len(arguments["completions"]) for arguments in calls]
        last = time.monotonic() + sum(seconds)
        missing = set(range(len(calls)))
        for number in range(len(calls)):

            def later(number: int = number) -> float:
                """Deadline of the call under way, perhaps a later one: answers are sent together."""
                call, since = self._progress.under_way(self._job) or (-1, 0.0)
                return min(last, since + seconds[call]) if number <= call < len(seconds) else 0.0

            if is_async:
                answer = self.receive(time.monotonic() + max(seconds) + 1.0)
            else:
                answer = self.receive(time.monotonic() + seconds[number], later)
            place = answer.get("call")
            if not isinstance(place, int) or place not in (missing if is_async else {number}):
                self.lose("died", f"{NO_ANSWER}: {answer!r:.200}")
            missing.discard(place)
            yield place, answer

    def under_way(self) -> int | None:
        call, _ = self._progress.under_way(self._job) or (None, 0.0)
        return call

    def end(self) -> None:
        super().end()
        self._progress.close()
