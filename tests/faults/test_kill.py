"""A few of the kills of `every_kill.py`, one a phase: the run goes on as if it had not been."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from tests.faults.kills import PPO_MAX, SHARDED, Straight, alone, killed_and_resumed, together
from tests.faults.processes import Fault

FEW = [
    Fault("rlhf.rollout.native:NativeEngine._decode", 40),
    Fault("rlhf.rewards.scoring:Rewards.gather", 2),
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
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 1, straight)


@pytest.mark.multi
def test_a_killed_rank_ends_the_other_and_both_go_on_as_if_it_had_not_been(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight
) -> None:
    fault = Fault("torch.autograd:backward", 3, rank=1)
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 2, straight)


def test_every_kill_point_is_a_function_of_the_code_as_it_is() -> None:
    for fault in [*alone(), *together(), *PPO_MAX, *SHARDED]:
        module, _, path = fault.where.partition(":")
        assert callable(attrgetter(path)(import_module(module))), fault.where
