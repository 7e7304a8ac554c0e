"""A few of the kills of `every_kill.py`, one a phase: the run goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Straight
from tests.faults.kills import killed_and_resumed
from tests.faults.processes import Fault

FEW = [
    Fault("rlhf.rollout.native:NativeEngine._decode", 40),
    Fault("rlhf.rewards.scoring:Rewards.score", 2),
    Fault("torch.autograd:backward", 6),
    Fault("torch.optim:AdamW.step", 5),
    Fault("rlhf.checkpoint:save_file", 2),
    Fault("os:rename", 1),
    Fault("rlhf.weights:WeightSync.push", 4),
]


@pytest.mark.parametrize("fault", FEW, ids=str)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 1, straight(1))


@pytest.mark.multi
def test_a_killed_rank_ends_the_other_and_both_go_on_as_if_it_had_not_been(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight
) -> None:
    fault = Fault("torch.autograd:backward", 3, rank=1)
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 2, straight(2))
