"""Functions that use up the memory of their workers, and objectives that take the names of metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.rewards.workers.pool import RewardError
from tests.rewards.test_hostile import causes, given, made, made_of, submit


def test_a_function_that_leaks_gets_new_workers_and_loses_no_sample() -> None:
    """100 MiB a call of 512: each worker scores a few of the twelve samples."""
    with made("leak", max_failed_share=0.0) as rewards:
        scoring = submit(rewards, ["a" * i for i in range(12)])
        groups, metrics = scoring.result()
    assert [trajectory.reward for trajectory in groups[0].trajectories] == [float(i) for i in range(12)]
    assert 2 <= metrics["reward/replaced/leak"].value <= 6


def test_an_objective_may_not_take_the_name_of_a_metric(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def std(completions, **_):\n    return [{'mean': 1.0} for _ in completions]\n")
    with pytest.raises(ValueError, match=r"no objective may be called std.*set the function's name"):
        Rewards([RewardSpec(f"{file}:std")], (), max_failed_share=0.0)
    refused = pytest.raises(RewardError, match="mine: no objective may be called mean")
    with made_of(f"{file}:std", name="mine", workers=1) as rewards, refused:
        given(submit(rewards, ["a"]))


def test_a_sample_that_needs_too_much_by_itself_still_fails() -> None:
    with made("leak_untouched", max_failed_share=1.0) as rewards:
        scoring = submit(rewards, ["a", "b"])
        assert given(scoring) == [None, None] and "MemoryError" in causes(scoring)[0][2]
