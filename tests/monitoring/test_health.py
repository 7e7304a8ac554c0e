"""A run that does not learn gets one warning, which says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.metrics import Mean
from rlhf.monitoring.health import HealthWatch
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.progress import SilentDisplay
from rlhf.monitoring.records import append_eval
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


def test_a_judge_that_judges_the_place_is_reported_and_few_duels_are_not() -> None:
    biased = HEALTHY | {"duels/asked": 8.0, "duels/first": 0.95}
    (said,) = told([biased] * 3)
    assert "the judge prefers the completion in one place in more than 9 of 10 comparisons" in said
    assert len(told([biased | {"duels/first": 0.05}] * 3)) == 1
    # one step in which the other place wins too; 3 steps of 6 duels are 18, of 20
    assert told([biased, biased | {"duels/first": 0.4}, biased]) == []
    assert told([biased | {"duels/asked": 6.0}] * 3) == []


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


# of a step that compares pairs of a file: half of the completions have reward 1; nothing has an advantage
PAIRED = {
    "reward/mean": 0.5,
    "reward/std": 0.5,
    "length/truncated": 0.0,
    "offline/kept_fraction": 1.0,
    "grad_norm": 0.7,
    "pairs/accuracy": 0.6,
    "pairs/margin": 0.1,
    "pairs/loss": 0.6,
    "pairs/chosen_logratio": 0.2,
}
SINGLES = PAIRED | {"reward/std": 0.0}


@pytest.mark.parametrize("steps", [PAIRED, SINGLES, PAIRED | {"length/truncated": 1.0}])
def test_the_labels_and_lengths_of_given_pairs_are_no_findings(steps: dict[str, float]) -> None:
    """A pair has rewards 1 and 0; single labels may be as many good ones as bad ones at every step."""
    watch = HealthWatch(3)
    assert [text for _ in range(9) for text in (*watch.check(steps), *watch.at_once(steps, "step's"))] == []


def test_what_the_policy_samples_for_its_pairs_is_still_looked_at() -> None:
    online = {name: value for name, value in PAIRED.items() if name != "offline/kept_fraction"}
    (said,) = told([online | {"length/truncated": 1.0}] * 9)
    assert "end-of-sequence token is never trained" in said
    assert "cut at the token limit" in HealthWatch().at_once(online | {"length/truncated": 0.5}, "step's")[0]


def test_pairs_whose_loss_is_all_past_its_bound_are_one_finding() -> None:
    said = told([PAIRED | {"grad_norm": 0.0}] * 9)
    assert len(said) == 1 and "look at pairs/weight" in said[0] and "advantages" not in said[0]


def falling(chosen: float, margin: float, steps: int = 6) -> list[dict[str, float]]:
    """Steps in which chosen completions change by `chosen` nats and the margin by `margin`, with noise."""
    return [
        PAIRED
        | {"pairs/chosen_logratio": -6.0 + i * chosen + 0.1 * (-1) ** i, "pairs/margin": 1.0 + i * margin}
        for i in range(steps)
    ]


def test_chosen_completions_that_get_less_likely_while_the_margin_grows_are_a_finding() -> None:
    (said,) = told(falling(-0.5, 0.2))
    assert said.startswith("chosen completions become less likely while the margin grows")
    for words in ("learner.lr", "algorithm.beta", "rpo or dpop", "refresh the pairs"):
        assert words in said
    assert told(falling(0.5, 0.2)) == [], "they rise"
    assert told(falling(-0.5, -0.2)) == [], "the margin does not grow"
    assert (
        told(
            [
                step | {"pairs/chosen_logratio": step["pairs/chosen_logratio"] + 2.0}
                for step in falling(-0.1, 0.2)
            ]
        )
        == []
    )
    without = [{k: v for k, v in step.items() if k != "pairs/chosen_logratio"} for step in falling(-0.5, 0.2)]
    assert told(without) == [], "a method without a reference has no log-ratio"


def evaluated(entropies: Sequence[float], margins: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"step": 5 * i, "pairs": {"topk_entropy": entropy, "margin": margin}}
        for i, (entropy, margin) in enumerate(zip(entropies, margins, strict=True))
    ]


def heard(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    watch = HealthWatch()
    return [watch.evaluated(record) for record in records]


def test_an_entropy_far_below_its_highest_while_the_margin_grows_is_said_once() -> None:
    # 1 - .7 / 1.05 = 33 %; .8 would be 24 %
    *quiet, said, later = heard(evaluated([1.0, 1.05, 0.8, 0.7, 0.6], [0.0, 1.0, 2.0, 3.0, 4.0]))
    assert quiet == [[], [], []] and later == []
    assert "33% below its highest while the margin" in said[0] and "checkpoint.keep_best" in said[0]
    assert heard(evaluated([1.0, 0.5, 0.4], [2.0, 2.0, 1.0])) == [[], [], []], "the margin does not grow"
    assert heard([{"step": 0, "pairs": None}, {"step": 5}]) == [[], []]


def test_a_resumed_run_knows_the_highest_entropy_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("accuracy", "num_samples", "ci_low", "ci_high", "samples")
    pairs = {"num_pairs": 40, "accuracy": 0.6, "ci_low": 0.5, "ci_high": 0.7}
    first, second = (
        dict.fromkeys(keys) | {"num_samples": 0, "samples": []} | r | {"pairs": pairs | r["pairs"]}
        for r in evaluated([1.0, 0.5], [0.0, 1.0])
    )
    append_eval(RunFolder(tmp_path), first)
    said: list[str] = []
    display = SilentDisplay()
    monitor = Monitor(RunFolder(tmp_path), sinks=[], display=display, samples_per_step=0)
    monkeypatch.setattr(monitor, "warn", said.append)
    monitor.evaluated(second)
    assert len(said) == 1 and "50% below its highest" in said[0]
    assert display.progress.held_out == (
        "after step 5: held-out pair accuracy 0.600, 95% interval 0.500 to 0.700, 40 pairs"
    )


def test_samples_without_signal_are_no_reason_to_change_anything_where_pairs_teach() -> None:
    record = {"no_signal": 0.9, "truncated": 0.6, "pairs": {"accuracy": 0.5}}
    (cut,) = HealthWatch().at_once(record, "held-out")
    assert "60% of the held-out completions are cut" in cut


def test_a_constant_reward_says_nothing_of_a_run_that_learns_from_a_teacher_or_by_imitation() -> None:
    measured = {"reward/mean": 0.0, "reward/std": 0.0, "grad_norm": 0.7}
    assert told([measured | {"kl/exact": 0.1}] * 4) == []
    assert len(told([measured] * 4)) == 1
    # completions of the data are imitated whatever their reward
    imitated = {"offline/kept_fraction": 1.0, "advantage/zero_fraction": 0.0}
    assert told([measured | imitated] * 4) == []
    assert len(told([measured | {"offline/kept_fraction": 1.0, "advantage/zero_fraction": 0.5}] * 4)) == 1
    # with advantages beside the exact KL it is a run that should learn from its rewards
    assert len(told([measured | {"kl/exact": 0.1, "advantage/zero_fraction": 0.9}] * 4)) == 1
