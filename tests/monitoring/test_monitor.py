"""What the monitor records and shows; none of its failures may stop the run."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf.metrics import Mean
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.progress import Display, SilentDisplay
from rlhf.monitoring.run_folder import RunFolder
from rlhf.monitoring.sinks import Sink, make_sink
from rlhf.types import FinishReason, Group, Prompt, Trajectory, VersionSpan
from tests.support import STEP


class Heard(SilentDisplay):
    """A display that keeps the notes and warnings it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str, *, warning: bool) -> None:
        self.said.append(f"warning: {text}" if warning else text)


def monitor(
    folder: Path, *, sinks: Sequence[Sink] = (), display: Display | None = None, samples: int = 2
) -> Monitor:
    return Monitor(
        RunFolder(folder), sinks=sinks, display=display or SilentDisplay(), samples_per_step=samples
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_step_is_one_line_of_averages(tmp_path: Path) -> None:
    with monitor(tmp_path) as m:
        m.log(1, STEP)
        m.log(2, {"reward/mean": Mean(1.0), "clip_fraction": Mean(0.0, 0.0), "grad_norm": Mean(math.inf)})
        first, second = lines(tmp_path / "metrics.jsonl")
    assert first["step"] == 1 and first["reward/mean"] == 0.75 and first["length/mean"] == 9.8
    assert second == {"step": 2, "reward/mean": 1.0, "clip_fraction": None, "grad_norm": None}


class Clock:
    """A clock that moves only when the test says so."""

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


def test_a_time_that_is_given_replaces_the_measured_one(tmp_path: Path) -> None:
    with monitor(tmp_path) as m:
        m.phase("learn")
        m.log(1, {"time/learn": Mean(2.5)})
        assert lines(tmp_path / "metrics.jsonl")[0]["time/learn"] == 2.5


def test_samples_hold_text_rewards_and_tokens_of_each_completion(tmp_path: Path) -> None:
    with monitor(tmp_path, samples=2) as m:
        m.samples(3, [group("a"), group("b", content=[{"role": "user", "content": "größer?"}]), group("c")])
        m.learned(None)
        first, second = lines(tmp_path / "samples.jsonl")
    assert first == {
        "step": 3,
        "prompt_id": "a",
        "prompt": "What is 3 + 5?",
        "completions": [
            {
                "text": "8",
                "reward": 1.0,
                "objectives": {"right": 1.0},
                "finish_reason": "stop",
                "num_tokens": 1,
            },
            {
                "text": "nine",
                "reward": None,
                "objectives": {"right": None},
                "finish_reason": "length",
                "num_tokens": 1,
            },
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
    """A sink whose service is unreachable from the second step on."""

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
            m.log(step, STEP)
    assert sink.steps == [1]
    assert heard.said == [
        "warning: Failing failed and is not used any more: ConnectionError: no route to host"
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
    """Limits the size of files, which is like a full disk and needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_a_full_disk_refused_are_written_when_there_is_room_again(tmp_path: Path) -> None:
    heard = Heard()
    with monitor(tmp_path, display=heard) as m:
        m.log(1, STEP)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        # only a part of the next line fits: that part must not stay in the file
        with files_no_larger_than(size + 20):
            m.log(2, STEP)
            m.log(3, STEP)
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
        m.log(4, STEP)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(heard.said) == 1 and "metrics.jsonl cannot be written" in heard.said[0]


def test_lines_that_never_got_room_are_counted_at_the_end(tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with monitor(tmp_path, display=heard) as m:
        m.log(1, STEP)
        m.log(2, STEP)
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
        m.log(1, STEP)
        m.warn("nobody hears this")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_finite_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path)
    for first in (1, 2):
        # the second run resumes after step 1, and hides step 2 of the first run
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
    expected = rf"asks for {name}, which is not installed: pip install 'tandem-rl\[{name}\]'"
    with pytest.raises(ValueError, match=expected):
        Monitor.start(RunFolder(tmp_path), sinks=[name], total_steps=1, samples_per_step=0, settings={})


def test_a_finding_is_shown_as_a_warning(tmp_path: Path) -> None:
    heard = Heard()
    with monitor(tmp_path, display=heard) as m:
        for step in range(1, 9):
            m.log(step, {"reward/mean": Mean(0.5), "reward/std": Mean(0.0)})
    assert len(heard.said) == 1 and heard.said[0].startswith("warning: every completion gets the same reward")
