"""A few kills of `every_kill.py`, one for each phase: the resumed run equals one that was never killed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from tests.faults.kills import PPO_MAX, SHARDED, STUCK, Straight, alone, killed_and_resumed, together
from tests.faults.processes import Fault

FEW = [
    Fault("rlhf.rollout.native.engine:NativeEngine._decode", 40),
    Fault("rlhf.rewards.scoring:Rewards.gather", 2),
    Fault("torch.autograd:backward", 6),
    Fault("rlhf.learn.master_weights:Master.update", 115),
    Fault("rlhf.checkpoints.store:save_file", 2),
    Fault("os:rename", 1),
    Fault("rlhf.sync.weight_sync:WeightSync.push", 4),
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


def test_make_runs_all_of_them() -> None:
    """pytest silently leaves out files that are not named test_*.py, unless the command names them."""
    root = Path(__file__).parents[2]
    makefile = (root / "Makefile").read_text()
    line = re.search(r"^test-faults:.*\n.* pytest (.*) \$\(ARGS\)$", makefile, re.MULTILINE)
    assert line is not None
    files = [str(file) for pattern in line[1].split() for file in sorted(root.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False).stdout
    kills = len(alone()) + len(together()) + 2 * len(PPO_MAX) + len(SHARDED)
    assert len(re.findall(r"every_kill.py::.*killed_anywhere\[", said)) == kills, said
    assert "every_damage.py::" in said and "test_faults.py::" in said


def test_every_kill_point_is_a_function_of_the_code_as_it_is() -> None:
    stuck = [Fault(where, call) for where, call, _ in STUCK]
    for fault in [*alone(), *together(), *PPO_MAX, *SHARDED, *stuck]:
        module, _, path = fault.where.partition(":")
        assert callable(attrgetter(path)(import_module(module))), fault.where
