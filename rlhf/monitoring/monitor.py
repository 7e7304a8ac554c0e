"""The record of a run: RUN/metrics.jsonl, RUN/samples.jsonl, TensorBoard and others, and what a person sees.

    with Monitor.start(run, sinks=[], total_steps=20, samples_per_step=2, settings={}) as monitor:
        monitor.phase("rollout")    # ends the phase before; its seconds become time/rollout of this step
        monitor.phase("learn")
        monitor.log(1, metrics)

Nothing here raises into training once it has started. A sink that fails is named once and left out from then
on. A line of metrics.jsonl or samples.jsonl that cannot be written (the disk is full) is kept and written
with the next one: the run goes on, and stops with a clear error where it would lose work, at its checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from rlhf.metrics import Partial
from rlhf.monitoring.health import HealthWatch
from rlhf.monitoring.progress import Display, SilentDisplay, open_display
from rlhf.monitoring.records import append_eval, describe_eval
from rlhf.monitoring.run_folder import RunFolder
from rlhf.monitoring.samples import Shown, TokenTexts
from rlhf.monitoring.sinks import Sink, SinkName, make_sink
from rlhf.types import Experience, Group


class Stream:
    """JSON lines, each of which is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def append(self, entry: Mapping[str, Any]) -> OSError | None:
        """Writes the entry and those before it that could not be written; returns why it could not."""
        self.waiting.append(json.dumps(entry, ensure_ascii=False, allow_nan=False, default=str) + "\n")
        try:
            self._write("".join(self.waiting).encode())
        except OSError as error:
            return error
        self.waiting.clear()
        return None

    def _write(self, content: bytes) -> None:
        # opened anew each time: a resumed run cuts the file by replacing it
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise


class Phase:
    """What `Monitor.phase` returns. As a context manager it is no part of a step (an evaluation, say)."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.monitor.end_phase(within_step=False)


class Monitor:
    """One a run, on the first rank; the others have `Monitor.silent()`."""

    def __init__(
        self,
        run: RunFolder | None,
        *,
        sinks: Sequence[Sink],
        display: Display,
        samples_per_step: int,
        texts: TokenTexts | None = None,
    ) -> None:
        self.run = run
        self.metrics = None if run is None else Stream(run.metrics)
        self.groups = None if run is None else Stream(run.samples)
        self.sinks = list(sinks)
        self.display = display
        self.samples_per_step = samples_per_step
        self.texts = texts
        self.watch: HealthWatch | None = None
        self._shown: Shown | None = None
        self._told: set[Path] = set()
        self.on_phase: Callable[[str], None] | None = None
        """Is told of each phase as it begins."""
        self._phase: str | None = None
        self._phase_since = 0.0
        self._step_since: float | None = None
        self._outside = 0.0
        self._seconds: dict[str, float] = {}

    @classmethod
    def start(
        cls,
        run: RunFolder,
        *,
        sinks: Sequence[SinkName],
        total_steps: int,
        samples_per_step: int,
        settings: Mapping[str, Any],
        texts: TokenTexts | None = None,
    ) -> Monitor:
        """Opens the sinks by name; `settings` is what W&B and trackio show as the run's config. With `texts`
        the completions in RUN/samples.jsonl are written token by token too.

        Raises SinkError as `make_sink` does.
        """
        opened = [make_sink(name, run, settings) for name in sinks]
        display = open_display(str(run.path), total_steps)
        return cls(run, sinks=opened, display=display, samples_per_step=samples_per_step, texts=texts)

    @classmethod
    def silent(cls) -> Monitor:
        """Times phases and writes nothing."""
        return cls(None, sinks=(), display=SilentDisplay(), samples_per_step=0)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def phase(self, name: str) -> Phase:
        """Begins a phase and ends the one before. Phases of one name add up to `time/<name>` of the step."""
        self.end_phase()
        now = time.monotonic()
        self._phase, self._phase_since = name, now
        if self._step_since is None:
            self._step_since = now
        self.display.enter(name)
        if self.on_phase is not None:
            self.on_phase(name)
        return Phase(self)

    def end_phase(self, *, within_step: bool = True) -> None:
        if self._phase is not None:
            spent = time.monotonic() - self._phase_since
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
            self._outside += 0.0 if within_step else spent
            self._phase = None
            self.display.enter(None)

    def log(self, step: int, metrics: Mapping[str, Partial]) -> None:
        """Records one step, with `time/<phase>` and `time/step` (from its first phase on) where not given.

        An evaluation or a checkpoint, a phase in a `with` block, is timed too, but outside of `time/step`.
        What is no finite number is null in metrics.jsonl and left out elsewhere.
        """
        values = {**self._times(), **{name: float(partial.value) for name, partial in metrics.items()}}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.watch is None:
            self.watch = self._watch()
        if self.metrics is not None:
            self._append(self.metrics, {"step": step, **{name: finite.get(name) for name in values}})
        self._write(step, finite)
        self.display.advance(step, finite)
        for text in self.watch.look(finite):
            self.warn(text)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Records an evaluation  in RUN/eval.json and as `eval/accuracy`, and says it."""
        if self.run is None:
            return
        try:
            append_eval(self.run, record)
        except OSError as error:
            self.warn(f"{self.run.evaluations} cannot be written, this evaluation is missing there: {error}")
        self._write(record["step"], {"eval/accuracy": record["accuracy"]})
        self.note(describe_eval(record))

    def samples(self, step: int, groups: Sequence[Group], experience: Experience | None = None) -> None:
        """Records the completions of the first `samples_per_step` groups; `experience` begins with these.

        They are written by `learned`, or when the run ends.
        """
        self.learned(None)
        if self.groups is not None and self.samples_per_step:
            self._shown = Shown(step, tuple(groups[: self.samples_per_step]), experience)

    def learned(self, entropy: Tensor | None) -> None:
        """The step's samples have been learned from; `entropy` `[N]` is that of the experience's tokens."""
        if self._shown is not None and self.groups is not None:
            for record in self._shown.records(self.texts, entropy):
                self._append(self.groups, record)
        self._shown = None

    def note(self, text: str) -> None:
        self.display.say(text, warning=False)

    def warn(self, text: str) -> None:
        self.display.say(text, warning=True)

    def close(self) -> None:
        """Closes sinks and display, and says what could not be written. A second time does nothing."""
        self.end_phase()
        self.learned(None)
        for sink in tuple(self.sinks):
            try:
                sink.close()
            except sink.failures as error:
                self._drop(sink, error)
        self.sinks.clear()
        for stream in (self.metrics, self.groups):
            if stream is not None and stream.waiting:
                self.warn(f"{len(stream.waiting)} lines are missing at the end of {stream.path}")
                stream.waiting.clear()
        self.display.close()

    def _watch(self) -> HealthWatch:
        """One that knows the steps which a resumed run made before."""
        watch = HealthWatch()
        # what cannot be read is written anew soon, and said then
        with suppress(OSError, ValueError):
            known = self.run is not None and self.run.metrics.is_file()
            lines = self.run.metrics.read_text(encoding="utf-8").split("\n") if self.run and known else []
            for line in filter(None, lines):
                values: dict[str, float | None] = json.loads(line)
                watch.recall({name: value for name, value in values.items() if value is not None})
        return watch

    def _times(self) -> dict[str, float]:
        self.end_phase()
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        if self._step_since is not None:
            times["time/step"] = time.monotonic() - self._step_since - self._outside
        self._seconds, self._step_since, self._outside = {}, None, 0.0
        return times

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for sink in tuple(self.sinks):
            try:
                sink.write(step, values)
            except sink.failures as error:
                self._drop(sink, error)

    def _append(self, stream: Stream, entry: Mapping[str, Any]) -> None:
        error = stream.append(entry)
        if error is not None and stream.path not in self._told:
            self._told.add(stream.path)
            self.warn(f"{stream.path} cannot be written, its lines are kept until it can: {error}")

    def _drop(self, sink: Sink, error: Exception) -> None:
        self.sinks.remove(sink)
        self.warn(
            f"{type(sink).__name__} failed and is left out from here on: {type(error).__name__}: {error}"
        )
