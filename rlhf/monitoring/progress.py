"""What a person sees while a run goes on: a live panel on a terminal, one line a step anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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

Values = Mapping[str, float]

RECENT = 10
BARS = "▁▂▃▄▅▆▇█"
WARNING = "yellow"


class Shown(NamedTuple):
    """A metric that is shown, its label and its format."""

    name: str
    label: str
    format: str
    unit: str = ""


SHOWN = (
    Shown("reward/mean", "reward", "{:.3f}"),
    Shown("kl/ref", "kl", "{:.4f}"),
    Shown("entropy", "entropy", "{:.2f}"),
    Shown("length/mean", "length", "{:.1f}"),
    Shown("length/truncated", "truncated", "{:.0%}"),
    Shown("throughput/tokens_per_second", "", "{:.0f}", " tok/s"),
    Shown("time/step", "", "{:.1f}", " s"),
)
PARTS = ("time/rollout", "time/reward", "time/learn", "time/sync")


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def sparkline(numbers: Sequence[float], width: int) -> str:
    """The last `width` numbers as bars from the least to the largest of them."""
    shown = [x for x in numbers if x == x][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((x - low) * scale)] for x in shown)


class Course:
    """How far a run is and what its last steps said; both displays read it."""

    def __init__(self, name: str, total_steps: int) -> None:
        self.name = name
        self.total_steps = total_steps
        self.step = 0
        self.values: Values = {}
        self.rewards: list[float] = []
        self.phase: str | None = None
        self.phase_since = self.since = time.monotonic()
        self._finished: list[float] = []

    def enter(self, phase: str | None) -> None:
        self.phase, self.phase_since = phase, time.monotonic()

    def advance(self, step: int, values: Values) -> None:
        self.step, self.values = step, values
        if "reward/mean" in values:
            self.rewards.append(values["reward/mean"])
        self._finished = [*self._finished[-RECENT:], time.monotonic()]

    @property
    def left(self) -> float | None:
        """Seconds to the last step, at the pace of the last few with all that lay between them."""
        if len(self._finished) < 2:
            first = self.values.get("time/step")
            return None if first is None else first * (self.total_steps - self.step)
        pace = (self._finished[-1] - self._finished[0]) / (len(self._finished) - 1)
        return pace * (self.total_steps - self.step)


@runtime_checkable
class Display(Protocol):
    """Told of every event of a run."""

    def enter(self, phase: str | None) -> None: ...
    def advance(self, step: int, values: Values) -> None: ...
    def say(self, text: str, *, warning: bool) -> None: ...
    def close(self) -> None: ...


class SilentDisplay:
    """For ranks other than the first, and for tests."""

    def enter(self, phase: str | None) -> None:
        pass

    def advance(self, step: int, values: Values) -> None:
        pass

    def say(self, text: str, *, warning: bool) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """One aligned line a step."""

    def __init__(self, course: Course, console: Console) -> None:
        self.course = course
        self.console = console
        self._widths: dict[str, int] = {}

    def enter(self, phase: str | None) -> None:
        self.course.enter(phase)

    def advance(self, step: int, values: Values) -> None:
        self.course.advance(step, values)
        total = str(self.course.total_steps)
        fields = [f"step {step:>{len(total)}}/{total}", *self._fields(values)]
        if self.course.left is not None:
            fields.append(f"eta {duration(self.course.left)}")
        self._print("  ".join(fields))

    def say(self, text: str, *, warning: bool) -> None:
        self._print(f"warning: {text}" if warning else text)

    def close(self) -> None:
        pass

    def _fields(self, values: Values) -> list[str]:
        """A field keeps the widest size that it had, so that lines stay aligned."""
        fields: list[str] = []
        for shown in SHOWN:
            if shown.name in values:
                number = shown.format.format(values[shown.name])
                width = self._widths[shown.name] = max(self._widths.get(shown.name, 0), len(number))
                fields.append(f"{shown.label} {number:>{width}}{shown.unit}".strip())
        return fields

    def _print(self, line: str) -> None:
        # not through rich, which would break a long line at 80 columns
        self.console.file.write(line + "\n")
        self.console.file.flush()


class Panels:
    """A panel that stays at the bottom of the terminal; whatever else is printed goes above it."""

    def __init__(self, course: Course, console: Console) -> None:
        self.course = course
        self.console = console
        self.live = Live(get_renderable=self.render, console=console, refresh_per_second=4)
        self.live.start()

    def enter(self, phase: str | None) -> None:
        self.course.enter(phase)

    def advance(self, step: int, values: Values) -> None:
        self.course.advance(step, values)

    def say(self, text: str, *, warning: bool) -> None:
        self.console.print(Text(f"warning: {text}" if warning else text, style=WARNING if warning else ""))

    def close(self) -> None:
        self.course.enter(None)
        self.live.stop()

    def render(self) -> RenderableType:
        course = self.course
        rows: list[RenderableType] = [self._bar()]
        if course.values:
            rows += [self._reward(), Columns(self._cells(), padding=(0, 3))]
            rows += [row for row in (self._split(),) if row is not None]
        if course.phase is not None or not course.values:
            waited = duration(time.monotonic() - course.phase_since)
            rows.append(Spinner("dots", Text.assemble(course.phase or "starting", (f"  {waited}", "dim"))))
        return Panel(Group(*rows), title=Text(course.name), title_align="left", border_style="dim")

    def _bar(self) -> RenderableType:
        course = self.course
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column()
        grid.add_column(ratio=1)
        grid.add_column()
        spent = f"{duration(time.monotonic() - course.since)} spent"
        left = "" if course.left is None else f", {duration(course.left)} left"
        grid.add_row(
            f"step {course.step}/{course.total_steps}",
            ProgressBar(total=course.total_steps, completed=course.step),
            Text(spent + left, style="dim"),
        )
        return grid

    def _reward(self) -> RenderableType:
        rewards = self.course.rewards
        if not rewards:
            return Text("")
        text = Text.assemble(("reward ", "dim"), (f"{rewards[-1]:.3f}", "bold"))
        if len(rewards) > 1:
            width = max(10, self.console.width // 2)
            change = fmean(rewards[-RECENT:]) - fmean(rewards[:RECENT])
            text.append(f"  {sparkline(rewards, width)}", style="cyan")
            if len(rewards) > 2 * RECENT:
                text.append(f"  {change:+.3f} since the start", style="dim")
        return text

    def _cells(self) -> list[Text]:
        cells: list[Text] = []
        for shown in SHOWN:
            if shown.name in self.course.values and shown.name not in ("reward/mean", "time/step"):
                number = shown.format.format(self.course.values[shown.name])
                cells.append(Text.assemble((f"{shown.label} ".lstrip(), "dim"), number, (shown.unit, "dim")))
        return cells

    def _split(self) -> Text | None:
        values = self.course.values
        if "time/step" not in values:
            return None
        text = Text.assemble(("a step ", "dim"), f"{values['time/step']:.1f} s")
        for i, name in enumerate(name for name in PARTS if name in values):
            text.append(" = " if i == 0 else " + ", style="dim")
            text.append(f"{name.removeprefix('time/')} ", style="dim").append(f"{values[name]:.1f}")
        return text


def open_display(name: str, total_steps: int) -> Display:
    """The panel where stdout or stderr is a terminal, lines on stdout where neither is."""
    course = Course(name, total_steps)
    stdout, stderr = Console(), Console(stderr=True)
    for console in (stdout, stderr):
        # is_terminal alone is true in a pipe too where FORCE_COLOR is set
        if console.file.isatty() and console.is_terminal and not console.is_dumb_terminal:
            return Panels(course, console)
    return Lines(course, stdout)
