"""What a run records and what a person sees of it; nothing of it may stop the run."""

from __future__ import annotations

import io
import json
import math
import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlhf.metrics import Max, Mean, Partial, Sum
from rlhf.monitor import Monitor
from rlhf.progress import Course, Display, Lines, Nothing, Panels, duration, open_display, sparkline
from rlhf.run_folder import RunFolder
from rlhf.sinks import Sink, make_sink
from rlhf.types import FinishReason, Group, Prompt, Trajectory, VersionSpan
from rlhf.watch import Watch

METRICS: dict[str, Partial] = {
    "reward/mean": Mean(3.0, 4),
    "reward/std": Mean(0.5),
    "kl/ref": Mean(0.0021),
    "entropy": Mean(1.32),
    "length/mean": Mean(98.0, 10),
    "length/truncated": Mean(3.0, 100),
    "throughput/tokens_per_second": Sum(412.0),
    "memory/peak_gib": Max(3.5),
    "time/step": Mean(11.2),
}


class Heard(Nothing):
    """A display that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, *, warning: bool) -> None:
        self.said.append(f"warning: {text}" if warning else text)


def monitor(
    folder: Path, *, sinks: Sequence[Sink] = (), display: Display | None = None, samples: int = 2
) -> Monitor:
    return Monitor(RunFolder(folder), sinks=sinks, display=display or Nothing(), samples_per_step=samples)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_step_is_one_line_of_averages(tmp_path: Path) -> None:
    with monitor(tmp_path) as m:
        m.log(1, METRICS)
        m.log(2, {"reward/mean": Mean(1.0), "clip_fraction": Mean(0.0, 0.0), "grad_norm": Mean(math.inf)})
        first, second = lines(tmp_path / "metrics.jsonl")
    assert first["step"] == 1 and first["reward/mean"] == 0.75 and first["length/mean"] == 9.8
    assert second == {"step": 2, "reward/mean": 1.0, "clip_fraction": None, "grad_norm": None}


class Clock:
    """Time passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_phases_are_timed_and_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with monitor(tmp_path) as m:
        clock.wait(50.0)
        for name, seconds in (("rollout", 3.0), ("reward", 0.5), ("rollout", 2.0), ("learn", 4.0)):
            m.phase(name)
            clock.wait(seconds)
        m.log(1, {})
        m.phase("rollout")
        clock.wait(1.0)
        m.log(2, {})
        first, second = lines(tmp_path / "metrics.jsonl")
    times = {"time/rollout": 5.0, "time/reward": 0.5, "time/learn": 4.0, "time/step": 9.5}
    assert first == {"step": 1, **times}
    assert second == {"step": 2, "time/rollout": 1.0, "time/step": 1.0}


def test_an_evaluation_and_a_checkpoint_are_timed_outside_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with monitor(tmp_path) as m:
        with m.phase("eval"):
            clock.wait(30.0)
        m.phase("rollout")
        clock.wait(2.0)
        with m.phase("save"):
            clock.wait(7.0)
        m.phase("learn")
        clock.wait(1.0)
        m.log(1, {})
        m.phase("learn")
        clock.wait(1.5)
        m.log(2, {})
        first, second = lines(tmp_path / "metrics.jsonl")
    times = {"time/eval": 30.0, "time/rollout": 2.0, "time/save": 7.0, "time/learn": 1.0, "time/step": 3.0}
    assert first == {"step": 1, **times}
    assert second == {"step": 2, "time/learn": 1.5, "time/step": 1.5}


def test_a_time_that_is_given_counts(tmp_path: Path) -> None:
    with monitor(tmp_path) as m:
        m.phase("learn")
        m.log(1, {"time/learn": Mean(2.5)})
        assert lines(tmp_path / "metrics.jsonl")[0]["time/learn"] == 2.5


def test_samples_hold_what_a_person_asks_of_a_completion(tmp_path: Path) -> None:
    with monitor(tmp_path, samples=2) as m:
        m.samples(3, [group("a"), group("b", content=[{"role": "user", "content": "größer?"}]), group("c")])
        first, second = lines(tmp_path / "samples.jsonl")
    assert first == {
        "step": 3,
        "prompt_id": "a",
        "prompt": "What is 3 + 5?",
        "completions": [
            {"text": "8", "reward": 1.0, "objectives": {"right": 1.0}, "finish_reason": "stop"},
            {"text": "nine", "reward": None, "objectives": {"right": None}, "finish_reason": "length"},
        ],
    }
    assert second["prompt"] == [{"role": "user", "content": "größer?"}]


def group(prompt_id: str, content: Any = "What is 3 + 5?") -> Group:
    def trajectory(text: str, reward: float | None, right: float, reason: FinishReason) -> Trajectory:
        spans = (VersionSpan(0, 0, 1),)
        return Trajectory((7,), (True,), (0,), (-0.1,), reason, spans, text, reward, {"right": right})

    return Group(
        Prompt(prompt_id, (1, 2), content),
        (
            trajectory("8", 1.0, 1.0, FinishReason.STOP),
            trajectory("nine", None, math.nan, FinishReason.LENGTH),
        ),
    )


class Failing:
    """A sink whose service is gone from the second step on."""

    failures = (ConnectionError,)

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step > 1:
            raise ConnectionError("no route to host")
        self.steps.append(step)

    def close(self) -> None:
        raise ConnectionError("no route to host")


class Remembering:
    """A sink that works."""

    failures = ()

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.written.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def test_a_sink_that_fails_is_named_once_and_the_run_goes_on(tmp_path: Path) -> None:
    heard, sink = Heard(), Failing()
    with monitor(tmp_path, sinks=[sink], display=heard) as m:
        for step in (1, 2, 3):
            m.log(step, METRICS)
    assert sink.steps == [1]
    assert heard.said == [
        "warning: Failing failed and is left out from here on: ConnectionError: no route to host"
    ]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_sink_that_fails_while_closing_does_not_hide_the_runs_own_error(tmp_path: Path) -> None:
    heard = Heard()
    with (
        pytest.raises(ValueError, match="the run's own"),
        monitor(tmp_path, sinks=[Failing()], display=heard),
    ):
        raise ValueError("the run's own")
    assert len(heard.said) == 1


@contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """The nearest thing to a full disk that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_a_full_disk_refused_are_written_when_there_is_room_again(tmp_path: Path) -> None:
    heard = Heard()
    with monitor(tmp_path, display=heard) as m:
        m.log(1, METRICS)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        # room for a part of the next line: what was written of it must not stay
        with files_no_larger_than(size + 20):
            m.log(2, METRICS)
            m.log(3, METRICS)
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
        m.log(4, METRICS)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(heard.said) == 1 and "metrics.jsonl cannot be written" in heard.said[0]


def test_lines_that_never_got_room_are_counted_at_the_end(tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with monitor(tmp_path, display=heard) as m:
        m.log(1, METRICS)
        m.log(2, METRICS)
    assert "No space left on device" in heard.said[0]
    assert heard.said[1:] == [f"warning: 2 lines are missing at the end of {tmp_path / 'metrics.jsonl'}"]


def test_an_evaluation_is_recorded_and_said(tmp_path: Path) -> None:
    record = {"step": 5, "accuracy": 0.25, "num_samples": 8, "ci_low": 0.1, "ci_high": 0.5, "samples": []}
    heard, sink = Heard(), Remembering()
    with monitor(tmp_path, sinks=[sink], display=heard) as m:
        m.evaluated(record)
    assert json.loads((tmp_path / "eval.json").read_text()) == [record]
    assert sink.written == [(5, {"eval/accuracy": 0.25})]
    assert heard.said == ["after step 5: held-out accuracy 0.250, 95% interval 0.100 to 0.500, 8 samples"]


def test_an_evaluation_that_cannot_be_recorded_does_not_stop_the_run(tmp_path: Path) -> None:
    record = {"step": 5, "accuracy": 0.25, "num_samples": 8, "ci_low": 0.1, "ci_high": 0.5, "samples": []}
    heard = Heard()
    with monitor(tmp_path / "removed", display=heard) as m:
        m.evaluated(record)
    assert "eval.json cannot be written" in heard.said[0] and "accuracy 0.250" in heard.said[1]


def test_a_monitor_may_be_closed_before_its_context_ends(tmp_path: Path) -> None:
    heard, sink = Heard(), Remembering()
    with monitor(tmp_path, sinks=[sink], display=heard) as m:
        m.close()
        m.note("last words")
    assert sink.closed == 1 and heard.said == ["last words"]


def test_a_silent_monitor_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Monitor.silent() as m:
        with m.phase("rollout"):
            m.samples(1, [group("a")])
        m.log(1, METRICS)
        m.warn("nobody hears this")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_finite_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path)
    for first in (1, 2):
        # the second run resumes behind step 1, and hides the first one's step 2
        with monitor(tmp_path, sinks=[make_sink("tensorboard", run, {})]) as m:
            for step in range(first, 4):
                m.log(step, {"reward/mean": Mean(step + first / 10), "grad_norm": Mean(math.nan)})
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    scalars = [(event.step, round(event.value, 3)) for event in events.Scalars("reward/mean")]
    assert scalars == [(1, 1.1), (2, 2.2), (3, 3.2)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_sink_that_is_not_installed_is_a_clear_error_before_training(
    tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    expected = rf"asks for {name}, which is not installed; pip install 'tandem-rl\[{name}\]'"
    with pytest.raises(ValueError, match=expected):
        Monitor.start(RunFolder(tmp_path), sinks=[name], total_steps=1, samples_per_step=0, settings={})


def test_without_a_terminal_a_step_is_one_aligned_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Monitor.start(RunFolder(tmp_path), sinks=[], total_steps=20, samples_per_step=0, settings={}) as m:
        m.log(3, METRICS)
        m.warn("look out")
        m.note("checkpoint of step 3")
        m.log(10, METRICS | {"length/truncated": Mean(0.0)})
    third, warning, note, tenth = capsys.readouterr().out.splitlines()
    expected = (
        "step  3/20  reward 0.750  kl 0.0021  entropy 1.32  length 9.8  truncated 3%  412 tok/s  11.2 s  eta "
    )
    assert third.startswith(expected)
    assert (warning, note) == ("warning: look out", "checkpoint of step 3")
    assert tenth.startswith(expected.replace(" 3/", "10/").replace("3%", "0%"))


def test_the_time_left_follows_the_pace_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    course = Course("run", 100)
    assert course.left is None
    course.advance(1, {"time/step": 8.0})
    assert course.left == 99 * 8.0
    for step in range(2, 30):
        clock.wait(4.0)
        course.advance(step, {})
    assert course.left == pytest.approx(71 * 4.0)


def screen(width: int, steps: int, phase: str | None = None) -> str:
    """What the panel looks like on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True, color_system=None)
    panel = Panels(Course("runs/quickstart", 40), console)
    for step in range(1, steps + 1):
        values = {name: float(partial.value) for name, partial in METRICS.items()}
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
def test_the_panel_fits_its_terminal_and_says_it_all(width: int) -> None:
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


def test_the_panel_shows_the_phase_before_the_first_step() -> None:
    picture = screen(80, steps=0, phase="eval")
    assert "step 0/40" in picture and "eval" in picture
    assert "starting" in screen(80, steps=0)


def test_warnings_stay_above_the_panel() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    panel = Panels(Course("runs/quickstart", 40), console)
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


HEALTHY = {
    "reward/mean": 0.4,
    "reward/std": 0.5,
    "advantage/zero_fraction": 0.3,
    "length/truncated": 0.1,
    "grad_norm": 0.7,
}


def told(steps: Sequence[Mapping[str, float]], patience: int = 3) -> list[str]:
    watch = Watch(patience)
    return [text for values in steps for text in watch.look(values)]


@pytest.mark.parametrize(
    ("dead", "advice"),
    [
        ({"reward/mean": 0.0, "reward/std": 0.0}, "every completion gets the same reward"),
        ({"advantage/zero_fraction": 1.0}, "all advantages are zero"),
        ({"length/truncated": 1.0}, "every completion is cut at the token limit"),
        ({"grad_norm": 0.0}, "no parameter changes"),
    ],
)
def test_a_run_that_does_nothing_is_told_once_and_what_to_do(dead: dict[str, float], advice: str) -> None:
    alive, idle = HEALTHY, HEALTHY | dead
    assert told([alive] * 10) == []
    assert told([alive, idle, idle, alive, idle]) == []
    said = told([alive, idle, idle, idle, idle, alive, idle, idle, idle])
    assert len(said) == 1 and advice in said[0] and said[0].endswith("(3 steps in a row)")


def test_a_reward_that_differs_between_steps_is_not_constant() -> None:
    steps = [HEALTHY | {"reward/mean": r, "reward/std": 0.0} for r in (0.1, 0.2, 0.1, 0.2)]
    assert told(steps) == []


def test_a_run_where_nothing_ever_ended_is_told_of_its_end_of_sequence() -> None:
    said = told([HEALTHY | {"length/truncated": 1.0}] * 8)
    assert len(said) == 1 and "no completion of this run has ended by itself" in said[0]


def test_no_gradient_without_advantages_is_one_finding_not_two() -> None:
    said = told([HEALTHY | {"advantage/zero_fraction": 1.0, "grad_norm": 0.0}] * 8)
    assert len(said) == 1 and "all advantages are zero" in said[0]


def test_a_finding_reaches_the_person(tmp_path: Path) -> None:
    heard = Heard()
    with monitor(tmp_path, display=heard) as m:
        for step in range(1, 9):
            m.log(step, {"reward/mean": Mean(0.5), "reward/std": Mean(0.0)})
    assert len(heard.said) == 1 and heard.said[0].startswith("warning: every completion gets the same reward")
