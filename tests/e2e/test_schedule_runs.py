"""Whole runs in which numbers of the algorithm follow the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import bandit_settings, metrics_of, train, train_interrupted, without_clocks

LAST_KL_IS_ZERO: dict[str, Any] = {"values": [0.0, 0.3, 0.0]}


def settings(folder: Path, model: Path, **algorithm: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    base = bandit_settings(folder, model, steps=3, algorithm={"name": "grpo"} | algorithm)
    base["rollout"]["prompts_per_step"] = 4
    base["learner"] |= {"epochs": 2}
    return base


def test_a_step_learns_with_the_numbers_in_force(tmp_path: Path, tiny_model_dir: Path):
    """A run whose bound is narrow and then wide begins as one whose bound stays narrow."""
    kl, runs = {"coef": 0.0}, dict[str, list[dict[str, Any]]]()
    for name, bound in {"narrow": 1e-4, "widens": {"values": [1e-4, 10.0]}}.items():
        train(
            settings(tmp_path / name, tiny_model_dir, clip_low=bound, clip_high=bound, kl=kl) | {"steps": 2}
        )
        runs[name] = metrics_of(tmp_path / name)
    assert [step["schedule/clip_high"] for step in runs["widens"]] == [1e-4, 10.0]
    narrow, widens = ([step["clip_fraction"] for step in run] for run in runs.values())
    assert narrow[0] == widens[0] > 0
    assert narrow[1] > 0 == widens[1]
    # constant numbers are no schedule
    assert not any(key.startswith("schedule/") for key in runs["narrow"][0])


@pytest.mark.parametrize("kl", [{"estimator": "exact"}, {"estimator": "k1", "placement": "reward"}])
def test_a_stopped_run_goes_on_with_the_numbers_of_its_step(
    tmp_path: Path, tiny_model_dir: Path, kl: dict[str, Any]
):
    """With a KL that begins and ends at 0, stopped in the middle of step 2, where it is 0.3."""
    follows = {"kl": {"coef": LAST_KL_IS_ZERO} | kl, "entropy_coef": {"start": 0.01, "end": 0.0}}
    whole, stopped = (settings(tmp_path / name, tiny_model_dir, **follows) for name in ("whole", "stopped"))
    train(whole)
    train_interrupted(stopped, after=3)
    train(stopped | {"checkpoint": stopped["checkpoint"] | {"resume": "auto"}})
    steps = metrics_of(tmp_path / "whole")
    assert without_clocks(metrics_of(tmp_path / "stopped")) == without_clocks(steps)
    assert [step["schedule/kl.coef"] for step in steps] == [0.0, 0.3, 0.0]
    assert [step["schedule/entropy_coef"] for step in steps] == pytest.approx([0.01, 0.005, 0.0])
