"""`Monitor`: times phases, writes metrics.jsonl and samples.jsonl, and feeds the display, sinks and warnings.

    with Monitor.start(run, sinks=[], total_steps=20, samples_per_step=2, settings={}) as monitor:
        monitor.phase("rollout")    # ends the previous phase; its seconds become time/rollout of this step
        monitor.phase("learn")
        monitor.log(1, metrics)

Once a run has started, no error of monitoring stops it. A sink that fails is reported once and then not used.
A line of metrics.jsonl or samples.jsonl that cannot be written (the disk is full) is kept and written with
the next one. The run stops only where it would lose work: when a checkpoint cannot be written.
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

from rlhf.files import write_atomically
from rlhf.metrics import Partial
from rlhf.monitoring.health import HealthWatch
from rlhf.monitoring.progress import Display, SilentDisplay, open_display
from rlhf.monitoring.records import append_eval, describe_eval, eval_metrics, read_eval
from rlhf.monitoring.run_folder import RunFolder
from rlhf.monitoring.samples import ShownGroups, TokenTexts, to_line, with_entropy
from rlhf.monitoring.sinks import Sink, SinkName, make_sink
from rlhf.types import Experience, Group


class Stream:
    """A file of JSON lines; each line is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def append(self, entry: Mapping[str, Any]) -> OSError | None:
        """Writes the entry and the earlier ones that could not be written; returns the error, if any."""
        self.waiting.append(to_line(entry) + "\n")
        try:
            self._write("".join(self.waiting).encode())
        except OSError as error:
            return error
        self.waiting.clear()
        return None

    def _write(self, content: bytes) -> None:
        # opened for each write: a resumed run shortens the file by replacing it
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
    """What `Monitor.phase` returns. In a `with` block, the phase does not count in the time of a step."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.monitor.end_phase(within_step=False)


class Monitor:
    """The monitor of a run, on rank 0; the other ranks have `Monitor.silent()`."""

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
        self._shown: ShownGroups | None = None
        self._reported: set[Path] = set()
        self.on_phase: Callable[[str], None] | None = None
        """Called with the name of each phase as it begins."""
        self._phase: str | None = None
        self._phase_since = 0.0
        self._step_since: float | None = None
        self._outside = 0.0
        """Seconds since the step began that do not count in it: evaluations, checkpoints."""
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
        """Opens the sinks and the display. `settings` is what W&B and trackio show as the config of the run.
        With `texts`, RUN/samples.jsonl also has the tokens of each completion.

        Raises SinkError as `make_sink` does.
        """
        opened = [make_sink(name, run, settings) for name in sinks]
        algorithm = settings.get("algorithm", {}).get("name", settings.get("task", ""))
        model = Path(str(settings.get("model", {}).get("path", ""))).name
        about = ", ".join(part for part in (model, algorithm) if part)
        display = open_display(f"{run.path}  {about}" if about else str(run.path), total_steps)
        return cls(run, sinks=opened, display=display, samples_per_step=samples_per_step, texts=texts)

    @classmethod
    def silent(cls) -> Monitor:
        """A monitor that times phases and writes and shows nothing."""
        return cls(None, sinks=(), display=SilentDisplay(), samples_per_step=0)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def phase(self, name: str) -> Phase:
        """Begins a phase and ends the previous one. Phases of one name add up to `time/<name>` of a step."""
        self.end_phase()
        # before the clock is read: what the display does when a phase begins is not part of the phase
        self.display.enter(name)
        now = time.monotonic()
        self._phase, self._phase_since = name, now
        if self._step_since is None:
            self._step_since = now
        if self.on_phase is not None:
            self.on_phase(name)
        return Phase(self)

    def detail(self, text: str) -> None:
        """Says how far the present phase is."""
        self.display.progress.detail = text

    def expect(self, estimate: Callable[[], float]) -> None:
        """Takes an estimate of a step's seconds, for the time left until a step has been measured."""
        self.display.progress.estimate = estimate

    def end_phase(self, *, within_step: bool = True) -> None:
        if self._phase is not None:
            spent = time.monotonic() - self._phase_since
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
            self._outside += 0.0 if within_step else spent
            self._phase = None
            self.display.enter(None)

    def log(self, step: int, metrics: Mapping[str, Partial]) -> None:
        """Records one step. Adds `time/<phase>`, and `time/step` from the first phase on, where not given.

        A phase in a `with` block (an evaluation, a checkpoint) has its own time, which `time/step` excludes.
        A value that is not finite is null in metrics.jsonl and left out elsewhere.
        """
        values = {**self._times(), **{name: float(partial.value) for name, partial in metrics.items()}}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.watch is None:
            self.watch = self._new_watch()
        if self.metrics is not None:
            self._append(self.metrics, {"step": step, **{name: finite.get(name) for name in values}})
        self._write(step, finite)
        self.display.advance(step, finite)
        for text in (*self.watch.at_once(finite, "step's"), *self.watch.check(finite)):
            self.warn(text)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Records an evaluation in RUN/eval.json and as metrics (`eval/accuracy`), and prints it."""
        if self.run is None:
            return
        if self.watch is None:
            self.watch = self._new_watch()
        try:
            append_eval(self.run, record)
        except (OSError, ValueError) as error:
            self.warn(f"{self.run.evaluations} cannot be written; this evaluation is missing in it: {error}")
        self._write(record["step"], eval_metrics(record))
        told = describe_eval(record)
        self.display.progress.held_out = told
        self.note(told)
        for text in (*self.watch.at_once(record, "held-out"), *self.watch.evaluated(record)):
            self.warn(text)

    def samples(self, step: int, groups: Sequence[Group], experience: Experience | None = None) -> None:
        """Takes the first `samples_per_step` groups of a step, for RUN/samples.jsonl.

        `experience` must begin with the tokens of these groups. `learned` writes them, or the end of the run.
        """
        self.learned(None)
        if self.groups is not None and self.samples_per_step:
            self._shown = ShownGroups(step, tuple(groups[: self.samples_per_step]), experience)

    def learned(self, entropy: Tensor | None) -> None:
        """Writes the samples of the step after its updates; `entropy` `[N]`: that of each token."""
        if self._shown is not None and self.groups is not None:
            for record in self._shown.records(self.texts, entropy):
                self._append(self.groups, record)
        self._shown = None

    def learned_later(self, step: int, entropy: Tensor | None) -> None:
        """Adds `entropy` to the samples of a step that was interrupted between its updates: RUN/samples.jsonl
        has them already.
        """
        if self.run is None or entropy is None or not self.run.samples.is_file():
            return
        try:
            lines = self.run.samples.read_text(encoding="utf-8").split("\n")
            write_atomically(self.run.samples, "\n".join(with_entropy(lines, step, entropy)))
        except (OSError, ValueError) as error:
            self.warn(f"{self.run.samples} cannot be changed; step {step} has no entropies in it: {error}")

    def note(self, text: str) -> None:
        self.display.say(text, warning=False)

    def warn(self, text: str) -> None:
        self.display.say(text, warning=True)

    def close(self) -> None:
        """Closes sinks and display, and reports what could not be written. A second call does nothing."""
        self.end_phase()
        self.learned(None)
        for sink in tuple(self.sinks):
            try:
                sink.close()
            except Exception as error:
                self._drop(sink, error)
        self.sinks.clear()
        for stream in (self.metrics, self.groups):
            if stream is not None and stream.waiting:
                self.warn(f"{len(stream.waiting)} lines are missing at the end of {stream.path}")
                stream.waiting.clear()
        self.display.close()

    def _new_watch(self) -> HealthWatch:
        """A HealthWatch that has the earlier steps and evaluations of a resumed run."""
        watch = HealthWatch()
        # an error here is not reported: writing to the same file fails soon after, and is reported then
        with suppress(OSError, ValueError):
            known = self.run is not None and self.run.metrics.is_file()
            lines = self.run.metrics.read_text(encoding="utf-8").split("\n") if self.run and known else []
            for line in filter(None, lines):
                values: dict[str, float | None] = json.loads(line)
                watch.recall({name: value for name, value in values.items() if value is not None})
            for record in read_eval(self.run) if self.run else []:
                watch.evaluated(record)
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
            except Exception as error:
                # the code of others, which may raise anything: the run goes on
                self._drop(sink, error)

    def _append(self, stream: Stream, entry: Mapping[str, Any]) -> None:
        error = stream.append(entry)
        if error is not None and stream.path not in self._reported:
            self._reported.add(stream.path)
            self.warn(f"{stream.path} cannot be written; its lines are kept and written later: {error}")

    def _drop(self, sink: Sink, error: Exception) -> None:
        self.sinks.remove(sink)
        self.warn(f"{type(sink).__name__} failed and is not used any more: {type(error).__name__}: {error}")
