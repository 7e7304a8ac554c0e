"""A run that does not learn gets one warning, which says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rlhf.metrics import Mean
from rlhf.monitoring.health import HealthWatch
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.progress import SilentDisplay
from rlhf.monitoring.run_folder import RunFolder

HEALTHY = {
    "reward/mean": 0.4,
    "reward/std": 0.5,
    "advantage/zero_fraction": 0.3,
    "length/truncated": 0.1,
    "grad_norm": 0.7,
}


def told(steps: Sequence[Mapping[str, float]], patience: int = 3) -> list[str]:
    watch = HealthWatch(patience)
    return [text for values in steps for text in watch.check(values)]


@pytest.mark.parametrize(
    ("dead", "advice"),
    [
        ({"reward/mean": 0.0, "reward/std": 0.0}, "every completion gets the same reward"),
        ({"advantage/zero_fraction": 1.0}, "all advantages are zero"),
        ({"length/truncated": 1.0}, "every completion is cut at the token limit"),
        ({"grad_norm": 0.0}, "no parameter changes"),
    ],
)
def test_a_run_that_does_nothing_is_warned_once_with_what_to_do(dead: dict[str, float], advice: str) -> None:
    alive, idle = HEALTHY, HEALTHY | dead
    assert told([alive] * 10) == []
    assert told([alive, idle, idle, alive, idle]) == []
    said = told([alive, idle, idle, idle, idle, alive, idle, idle, idle])
    assert len(said) == 1 and advice in said[0] and said[0].endswith("(3 steps in a row)")


def test_a_reward_that_differs_between_steps_is_not_constant() -> None:
    steps = [HEALTHY | {"reward/mean": r, "reward/std": 0.0} for r in (0.1, 0.2, 0.1, 0.2)]
    assert told(steps) == []


def test_a_run_where_no_completion_ever_ended_is_warned_about_its_end_of_sequence() -> None:
    said = told([HEALTHY | {"length/truncated": 1.0}] * 8)
    assert len(said) == 1 and "no completion of this run has ended by itself" in said[0]


def test_a_collapse_is_reported_and_any_two_of_its_three_signs_are_not() -> None:
    before = HEALTHY | {"length/mean": 20.0, "perplexity": 3.0, "kl/ref": 0.02}
    signs = {"length/mean": 40.0, "perplexity": 1.5, "kl/ref": 0.5}
    said = told([before] * 5 + [before | signs] * 5)
    assert len(said) == 1 and "a pattern that the reward function favours without being better" in said[0]
    for sign in signs:
        assert told([before] * 5 + [before | {k: v for k, v in signs.items() if k != sign}] * 5) == []
    # steps of the critic's warm-up have no perplexity and do not count as first steps
    assert len(told([HEALTHY] * 4 + [before] * 5 + [before | signs] * 5)) == 1
    # without a reference there is no KL to compare
    assert told([HEALTHY | {"perplexity": 3.0, "length/mean": 20.0}] * 5 + [before | signs] * 5) == []


def test_a_resumed_run_is_compared_with_its_own_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = HEALTHY | {"length/mean": 20.0, "perplexity": 3.0, "kl/ref": 0.02}
    after = before | {"length/mean": 40.0, "perplexity": 1.5, "kl/ref": 0.5}
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps({"step": i, **before}) + "\n" for i in range(5)))
    said: list[str] = []
    monitor = Monitor(folder, sinks=[], display=SilentDisplay(), samples_per_step=0)
    monkeypatch.setattr(monitor, "warn", said.append)
    for step in range(5, 12):
        monitor.log(step, {name: Mean(value) for name, value in after.items()})
    assert len(said) == 1 and "a pattern that the reward function favours" in said[0]


def test_no_gradient_without_advantages_is_one_finding_not_two() -> None:
    said = told([HEALTHY | {"advantage/zero_fraction": 1.0, "grad_norm": 0.0}] * 8)
    assert len(said) == 1 and "all advantages are zero" in said[0]


def test_a_large_share_is_said_at_once_with_the_setting_to_change() -> None:
    watch = HealthWatch()
    assert watch.at_once({"truncated": 0.49, "no_signal": None}, "held-out") == []
    (cut,) = watch.at_once({"truncated": 0.5, "no_signal": 0.2}, "held-out")
    assert cut.startswith("50% of the held-out completions are cut") and "max_completion_tokens" in cut
    (same,) = watch.at_once({"length/truncated": 0.9, "advantage/zero_fraction": 0.75}, "step's")
    assert same.startswith("75% of the step's completions are in groups without signal")
    assert "rollout.group_size" in same
    assert watch.at_once({"length/truncated": 1.0, "advantage/zero_fraction": 1.0}, "step's") == []
