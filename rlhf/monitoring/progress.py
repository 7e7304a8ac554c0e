"""The display of a run in progress: a live panel on a terminal, one line for each step elsewhere.

Neither is ever silent for long: the panel counts seconds, and between the lines of two steps a further line
says what the run is doing, how far it is and how much time is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import NamedTuple, Protocol, runtime_checkable

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rlhf.files import drop_unwritten, printable
from rlhf.monitoring.health import pairs_are_given

Values = Mapping[str, float]

RECENT = 10
"""Steps in the mean of the recent course, and in the pace from which the time left is estimated."""
BARS = "▁▂▃▄▅▆▇█"
WARNING = "yellow"
FIRST_SILENCE, LATER_SILENCE = 10.0, 30.0
"""Seconds without a line after which one says what the run is doing: in a phase the first time, and again."""


ESTIMATED_AFTER = 2.0
"""Seconds from the start on which the next phase begins with an estimate; shorter runs do without."""


class ShownMetric(NamedTuple):
    """A metric that the display shows, with its label, format and unit."""

    name: str
    label: str
    format: str
    unit: str = ""


# the first that a step has is also shown as a curve
COURSES = (
    ShownMetric("reward/mean", "reward", "{:.3f}"),
    ShownMetric("pairs/accuracy", "pair accuracy", "{:.3f}"),
    ShownMetric("kl/exact", "exact kl", "{:.4f}"),
)
SHOWN = (
    *COURSES,
    ShownMetric("pairs/margin", "margin", "{:.3f}"),
    ShownMetric("pairs/loss", "loss", "{:.4f}"),
    ShownMetric("kl/ref", "kl", "{:.4f}"),
    ShownMetric("entropy", "entropy", "{:.2f}"),
    ShownMetric("length/mean", "length", "{:.1f}"),
    ShownMetric("length/truncated", "truncated", "{:.0%}"),
    ShownMetric("advantage/zero_fraction", "no signal", "{:.0%}"),
    ShownMetric("update/no_signal", "updates without signal", "{:.0f}"),
    ShownMetric("throughput/tokens_per_second", "", "{:.0f}", " tok/s"),
    ShownMetric("time/step", "", "{:.1f}", " s"),
)
# of given pairs they are the data's
OF_ROLLOUTS = ("reward/mean", "length/mean", "length/truncated", "advantage/zero_fraction")
PHASE_TIMES = ("time/rollout", "time/reward", "time/learn", "time/sync")


def shown_metrics(values: Values) -> list[ShownMetric]:
    """The metrics of a step that are shown."""
    left_out = OF_ROLLOUTS if pairs_are_given(values) else ()
    return [shown for shown in SHOWN if shown.name in values and shown.name not in left_out]


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:30` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def sparkline(numbers: Sequence[float], width: int) -> str:
    """The last `width` numbers as bars, from the smallest to the largest of them; NaN is left out."""
    shown = [x for x in numbers if x == x][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((x - low) * scale)] for x in shown)


class Progress:
    """How far a run is, its current phase and the metrics of its last step, for both displays."""

    def __init__(self, name: str, total_steps: int) -> None:
        self.name = name
        self.total_steps = total_steps
        self.step = 0
        self.values: Values = {}
        self.course: dict[str, list[float]] = {metric.name: [] for metric in COURSES}
        """The values of each of `COURSES` so far."""
        self.phase: str | None = None
        self.detail = ""
        """How far the phase is: samples, microbatches."""
        self.held_out = ""
        """The last evaluation, in words."""
        self.estimate: Callable[[], float] | None = None
        """Estimates the seconds of a step; used until a step has been measured."""
        self._estimated_step: float | None = None
        self.phase_since = self.since = time.monotonic()
        self._finished: list[float] = []

    def enter(self, phase: str | None) -> None:
        self.phase, self.detail, self.phase_since = phase, "", time.monotonic()
        # here, and not in the thread of a display: the estimate measures products, and a second thread that
        # has made some keeps OpenMP's threads from waiting for work actively, which slows the whole run
        if self.estimate is not None and not self.step and self.phase_since - self.since > ESTIMATED_AFTER:
            self._estimated_step, self.estimate = self.estimate(), None

    def status(self) -> str:
        """What the run is doing now, in one line."""
        step = f"step {min(self.step + 1, self.total_steps)}/{self.total_steps}"
        parts = [f"{step}  {self.phase or 'starting'} {duration(time.monotonic() - self.phase_since)}"]
        if self.detail:
            parts.append(self.detail)
        if self.seconds_left is not None:
            parts.append(f"about {duration(self.seconds_left)} left")
        return ", ".join(parts)

    def advance(self, step: int, values: Values) -> None:
        self.step, self.values = step, values
        for name, numbers in self.course.items():
            numbers += [values[name]] if name in values else []
        self._finished = [*self._finished[-RECENT:], time.monotonic()]

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the pace of the last steps, with evaluations and checkpoints; before step 1 from
        `estimate`, None without one."""
        if len(self._finished) < 2:
            first = self.values.get("time/step", self._estimated_step)
            return None if first is None else first * (self.total_steps - self.step)
        pace = (self._finished[-1] - self._finished[0]) / (len(self._finished) - 1)
        return pace * (self.total_steps - self.step)


@runtime_checkable
class Display(Protocol):
    """Shows a run: phases, the metrics of each step, notes and warnings."""

    progress: Progress

    def enter(self, phase: str | None) -> None: ...
    def advance(self, step: int, values: Values) -> None: ...
    def say(self, text: str, *, warning: bool) -> None: ...
    def close(self) -> None: ...


class SilentDisplay:
    """Shows nothing: for all ranks but the first, and for tests."""

    def __init__(self) -> None:
        self.progress = Progress("", 0)

    def enter(self, phase: str | None) -> None:
        pass

    def advance(self, step: int, values: Values) -> None:
        pass

    def say(self, text: str, *, warning: bool) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Writes one line for each step, with aligned columns, and one whenever it has been silent for long."""

    def __init__(
        self,
        progress: Progress,
        console: Console,
        silence: tuple[float, float] = (FIRST_SILENCE, LATER_SILENCE),
    ) -> None:
        """`silence`: seconds without a line after which the status is written, first in a phase and later."""
        self.progress = progress
        self.console = console
        self._widths: dict[str, int] = {}
        self._silence, self._said_in_phase = silence, False
        self._last_line = time.monotonic()
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._break_silence, name="display", daemon=True).start()

    def enter(self, phase: str | None) -> None:
        self.progress.enter(phase)
        self._said_in_phase = False

    def advance(self, step: int, values: Values) -> None:
        self.progress.advance(step, values)
        total = str(self.progress.total_steps)
        fields = [f"step {step:>{len(total)}}/{total}", *self._fields(values)]
        if self.progress.seconds_left is not None:
            fields.append(f"eta {duration(self.progress.seconds_left)}")
        self._print("  ".join(fields))

    def say(self, text: str, *, warning: bool) -> None:
        self._print(printable(f"warning: {text}" if warning else text))

    def close(self) -> None:
        self._closed.set()
        drop_unwritten(self.console.file)

    def _break_silence(self) -> None:
        while not self._closed.wait(min(self._silence) / 10):
            limit = self._silence[self._said_in_phase]
            if time.monotonic() - self._last_line >= limit:
                self._said_in_phase = True
                self._print(self.progress.status())

    def _fields(self, values: Values) -> list[str]:
        """Each field is as wide as it has ever been, so that lines stay aligned."""
        fields: list[str] = []
        for shown in shown_metrics(values):
            number = shown.format.format(values[shown.name])
            width = self._widths[shown.name] = max(self._widths.get(shown.name, 0), len(number))
            fields.append(f"{shown.label} {number:>{width}}{shown.unit}".strip())
        return fields

    def _print(self, line: str) -> None:
        # not through rich, which would wrap a long line at 80 columns
        with self._lock:
            if self._closed.is_set() and threading.current_thread().name == "display":
                return
            self._last_line = time.monotonic()
            with _writing():
                self.console.file.write(line + "\n")
                self.console.file.flush()


class Panels:
    """A panel that stays at the bottom of the terminal; all other output appears above it."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress = progress
        self.console = console
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=4)
        with _writing():
            self.live.start()

    def enter(self, phase: str | None) -> None:
        self.progress.enter(phase)

    def advance(self, step: int, values: Values) -> None:
        self.progress.advance(step, values)

    def say(self, text: str, *, warning: bool) -> None:
        text = printable(text)
        shown = Text(f"warning: {text}", style=WARNING) if warning else Text(text)
        with _writing():
            self.console.print(shown)

    def close(self) -> None:
        self.progress.enter(None)
        with _writing():
            self.live.stop()

    def render(self) -> RenderableType:
        progress = self.progress
        rows: list[RenderableType] = [self._bar()]
        if progress.values:
            rows += [self._course(), Columns(self._cells(), padding=(0, 3))]
            rows += [row for row in (self._step_time(),) if row is not None]
        if progress.phase is not None or not progress.values:
            waited = duration(time.monotonic() - progress.phase_since)
            detail = f"  {progress.detail}" if progress.detail else ""
            words = Text.assemble(progress.phase or "starting", (f"  {waited}{detail}", "dim"))
            rows.append(Spinner("dots", words))
        if progress.held_out:
            rows.append(Text(progress.held_out, style="dim"))
        return Panel(Group(*rows), title=Text(progress.name), title_align="left", border_style="dim")

    def _bar(self) -> RenderableType:
        progress = self.progress
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column()
        grid.add_column(ratio=1)
        grid.add_column()
        spent = f"{duration(time.monotonic() - progress.since)} spent"
        left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
        grid.add_row(
            f"step {progress.step}/{progress.total_steps}",
            ProgressBar(total=progress.total_steps, completed=progress.step),
            Text(spent + left, style="dim"),
        )
        return grid

    def _course(self) -> RenderableType:
        """The first of `COURSES` that the last step shows, with its curve."""
        shown = self._drawn()
        if shown is None:
            return Text("")
        numbers = self.progress.course[shown.name]
        text = Text.assemble((f"{shown.label} ", "dim"), (shown.format.format(numbers[-1]), "bold"))
        if len(numbers) > 1:
            width = max(10, self.console.width // 2)
            change = fmean(numbers[-RECENT:]) - fmean(numbers[:RECENT])
            text.append(f"  {sparkline(numbers, width)}", style="cyan")
            if len(numbers) > 2 * RECENT:
                text.append(f"  {change:+.3f} since the start", style="dim")
        return text

    def _drawn(self) -> ShownMetric | None:
        return next((shown for shown in shown_metrics(self.progress.values) if shown in COURSES), None)

    def _cells(self) -> list[Text]:
        cells: list[Text] = []
        drawn = self._drawn()
        for shown in shown_metrics(self.progress.values):
            if shown != drawn and shown.name != "time/step":
                number = shown.format.format(self.progress.values[shown.name])
                cells.append(Text.assemble((f"{shown.label} ".lstrip(), "dim"), number, (shown.unit, "dim")))
        return cells

    def _step_time(self) -> Text | None:
        values = self.progress.values
        if "time/step" not in values:
            return None
        text = Text.assemble(("a step ", "dim"), f"{values['time/step']:.1f} s")
        for i, name in enumerate(name for name in PHASE_TIMES if name in values):
            text.append(" = " if i == 0 else " + ", style="dim")
            text.append(f"{name.removeprefix('time/')} ", style="dim").append(f"{values[name]:.1f}")
        return text


@contextmanager
def _writing() -> Generator[None]:
    """What is shown may be lost (a closed pipe, a terminal that is gone, a log on a full disk); the run may
    not. Its files have all of it.
    """
    try:
        yield
    except (OSError, ValueError, SystemExit):
        # ValueError: the file is closed; SystemExit: what rich makes of a closed pipe
        return


def open_display(name: str, total_steps: int) -> Display:
    """A panel where stdout or stderr is a terminal, otherwise lines on stdout."""
    progress = Progress(name, total_steps)
    stdout, stderr = Console(), Console(stderr=True)
    for console in (stdout, stderr):
        # is_terminal alone would be true in a pipe too, if FORCE_COLOR is set
        if console.file.isatty() and console.is_terminal and not console.is_dumb_terminal:
            return Panels(progress, console)
    return Lines(progress, stdout)
