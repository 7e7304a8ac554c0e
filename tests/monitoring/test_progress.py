"""The display of a run in progress: a panel on a terminal, one line for each step elsewhere."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlhf.metrics import Mean, Metrics
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.progress import Lines, Panels, Progress, duration, open_display, sparkline
from rlhf.monitoring.run_folder import RunFolder
from tests.support import STEP, bandit_settings, train


def test_without_a_terminal_a_step_is_one_aligned_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Monitor.start(RunFolder(tmp_path), sinks=[], total_steps=20, samples_per_step=0, settings={}) as m:
        m.log(3, STEP)
        m.warn("look out")
        m.note("checkpoint of step 3")
        m.log(10, STEP | {"length/truncated": Mean(0.0)})
    third, warning, note, tenth = capsys.readouterr().out.splitlines()
    expected = (
        "step  3/20  reward 0.750  kl 0.0021  entropy 1.32  length 9.8  truncated 3%  412 tok/s  11.2 s  eta "
    )
    assert third.startswith(expected)
    assert (warning, note) == ("warning: look out", "checkpoint of step 3")
    assert tenth.startswith(expected.replace(" 3/", "10/").replace("3%", "0%"))


PAIRED: Metrics = {
    "reward/mean": Mean(0.5),
    "length/mean": Mean(20.0),
    "length/truncated": Mean(0.0),
    "offline/kept_fraction": Mean(1.0),
    "pairs/accuracy": Mean(3.0, 4),
    "pairs/margin": Mean(0.25),
    "pairs/loss": Mean(0.5878),
}


def test_a_step_of_given_pairs_shows_these_and_not_the_rewards_of_their_labels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Monitor.start(RunFolder(tmp_path), sinks=[], total_steps=9, samples_per_step=0, settings={}) as m:
        m.log(1, PAIRED)
        m.log(2, {name: value for name, value in PAIRED.items() if not name.startswith("offline/")})
    given, sampled = capsys.readouterr().out.splitlines()
    assert given == "step 1/9  pair accuracy 0.750  margin 0.250  loss 0.5878"
    assert sampled.startswith(
        "step 2/9  reward 0.500  pair accuracy 0.750  margin 0.250  loss 0.5878  length 20.0"
    )


def test_the_time_left_follows_the_pace_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("run", 100)
    assert progress.seconds_left is None
    progress.advance(1, {"time/step": 8.0})
    assert progress.seconds_left == 99 * 8.0
    for step in range(2, 30):
        clock[0] += 4.0
        progress.advance(step, {})
    assert progress.seconds_left == pytest.approx(71 * 4.0)


def screen(width: int, steps: int, phase: str | None = None, metrics: Metrics = STEP) -> str:
    """The text of the panel on a terminal of the given width."""
    console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True, color_system=None)
    panel = Panels(Progress("runs/quickstart", 40), console)
    for step in range(1, steps + 1):
        values = {name: float(partial.value) for name, partial in metrics.items()}
        panel.advance(
            step,
            values | {"reward/mean": step / 40, "time/eval": 9.9, "time/rollout": 6.1, "time/learn": 4.2},
        )
    panel.enter(phase)
    picture = Console(file=io.StringIO(), width=width, color_system=None)
    picture.print(panel.render())
    panel.close()
    assert isinstance(picture.file, io.StringIO)
    return picture.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_fits_its_terminal_and_shows_every_metric(width: int) -> None:
    picture = screen(width, steps=30, phase="rollout")
    rows = picture.splitlines()
    assert all(len(row) == width for row in rows) and len(rows) <= 12
    text = re.sub(r"[\s│]+", " ", picture)
    for part in (
        "step 30/40",
        "reward 0.750",
        "kl 0.0021",
        "entropy 1.32",
        "length 9.8",
        "truncated 3%",
        "412 tok/s",
        "a step 11.2 s = rollout 6.1 + learn 4.2",
        "rollout 0:00",
        "left",
    ):
        assert part in text, picture


def test_the_panel_of_given_pairs_draws_their_accuracy() -> None:
    text = re.sub(r"[\s│]+", " ", screen(120, steps=30, metrics=PAIRED))
    assert re.search(r"pair accuracy 0.750 ▁+ \+0.000 since the start", text), text
    assert "margin 0.250" in text and "loss 0.5878" in text and text.count("pair accuracy") == 1
    for absent in ("reward", "length", "truncated", "no signal"):
        assert absent not in text


def test_the_panel_shows_the_phase_before_the_first_step() -> None:
    picture = screen(80, steps=0, phase="eval")
    assert "step 0/40" in picture and "eval" in picture
    assert "starting" in screen(80, steps=0)


def test_warnings_stay_above_the_panel() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    panel = Panels(Progress("runs/quickstart", 40), console)
    panel.say("look out", warning=True)
    panel.close()
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert printed.index("warning: look out") < printed.rindex("step 0/40")


def test_what_is_no_terminal_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(open_display("run", 3), Lines)


def test_durations_read_as_a_clock() -> None:
    assert [duration(s) for s in (0.4, 59.6, 190, 3723)] == ["0:00", "1:00", "3:10", "1:02:03"]


def test_a_sparkline_runs_from_the_least_to_the_largest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0, math.nan], 8) == "▁▁"
    assert sparkline([9, 0, 7], 2) == "▁█"
    assert sparkline([], 8) == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(1, 50))
def test_a_sparkline_has_a_bar_a_number(numbers: list[float], width: int) -> None:
    assert len(sparkline(numbers, width)) == min(len(numbers), width)


def test_no_phase_is_silent_for_longer_than_the_limit() -> None:
    """An engine and a learner that finish nothing: the display says what they do and how far it is."""
    console, progress = Console(file=io.StringIO()), Progress("run", 20)
    progress.estimate, progress.since = lambda: 30.0, progress.since - 3.0
    lines, written = Lines(progress, console, silence=(0.1, 0.2)), console.file
    assert isinstance(written, io.StringIO)
    expected = 0
    for phase, detail in (("rollout", "37 of 64 samples"), ("learn", "update 1 of 2, microbatch 3")):
        lines.enter(phase)
        progress.detail = detail
        expected += 3
        until = time.monotonic() + 60.0
        while len(written.getvalue().splitlines()) < expected and time.monotonic() < until:
            time.sleep(0.01)
    lines.close()
    said = written.getvalue().splitlines()
    assert len(said) >= 6
    for place, words in (
        (0, r"rollout \d:\d\d, 37 of 64 samples"),
        (-1, r"learn .*, update 1 of 2, microbatch 3"),
    ):
        assert re.fullmatch(rf"step 1/20  {words}, about 10:00 left", said[place]), said[place]
    time.sleep(0.5)
    assert written.getvalue().splitlines() == said, "a display that is closed says no more"


def test_a_run_says_how_far_each_phase_is(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Of a real run, whose display is asked at each of its details."""
    heard: list[str] = []

    def detail(self: Monitor, text: str) -> None:
        heard.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "detail", detail)
        settings = bandit_settings(tmp_path, tiny_model_dir, steps=1, learner={"minibatches": 2})
        settings["data"]["eval"] = str(tmp_path / "train.jsonl")
        train(settings)
    assert "64 of 64 samples" in heard and "320 of 320 samples" in heard
    assert "update 1 of 2, microbatch 1" in heard and "update 2 of 2, microbatch 1" in heard


LOGS = """
import sys
from pathlib import Path
from rlhf.metrics import Mean
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.run_folder import RunFolder

run = RunFolder(Path(sys.argv[1]))
with Monitor.start(run, sinks=[], total_steps=2, samples_per_step=0, settings={}) as m:
    for step in (1, 2):
        m.log(step, {"reward/mean": Mean(1.0)})
        m.warn("x" * 10000)
"""


@pytest.mark.parametrize("reader", ["head", "full"])
def test_output_that_nobody_can_read_does_not_end_the_run(tmp_path: Path, reader: str) -> None:
    """`| head`, which closes the pipe, and a log on a full disk."""
    if reader == "head":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", LOGS, str(tmp_path)]
    ended = subprocess.run(command, stdout=write, stderr=write, cwd=Path(__file__).parents[2])
    os.close(write)
    assert ended.returncode == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Gone(io.StringIO):
    """A terminal that was closed."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_panel_on_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    panel = Panels(Progress("run", 2), Console(file=Gone(), force_terminal=True))
    panel.say("look out", warning=True)
    panel.advance(1, {"reward/mean": 1.0})
    panel.close()


def test_what_a_completion_says_to_the_terminal_does_not_reach_it() -> None:
    """Escape sequences (clear the screen, change its title), a carriage return, text from right to left."""
    shown = [io.StringIO(), io.StringIO()]
    lines = Lines(Progress("run", 2), Console(file=shown[0]))
    panel = Panels(Progress("run", 2), Console(file=shown[1]))
    for display in (lines, panel):
        display.say("one\x1b[2J\x1b]0;title\x07\rtwo\u202ethree\n\tfour é", warning=False)
        display.close()
    assert shown[0].getvalue() == "one�[2J�]0;title��two�three\n\tfour é\n"
    assert "one�[2J�]0;title��two�three" in shown[1].getvalue()
