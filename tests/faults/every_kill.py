"""Every kill point, each resumed and compared bit for bit: `make test-faults`, not part of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import PPO_MAX, SHARDED, Straight, alone, killed_and_resumed, together
from tests.faults.processes import Fault


@pytest.mark.parametrize("fault", alone(), ids=str)
def test_one_rank_killed_anywhere(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 1, straight)


@pytest.mark.multi
@pytest.mark.parametrize("fault", together(), ids=str)
def test_one_of_two_ranks_killed_anywhere(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 2, straight)


@pytest.mark.multi
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", PPO_MAX, ids=str)
def test_a_run_with_a_critic_killed_anywhere(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault, ranks: int
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, ranks, straight, "ppo_max")


@pytest.mark.multi
@pytest.mark.parametrize("fault", SHARDED, ids=str)
def test_models_in_shards_killed_anywhere(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 2, straight, "sharded")


def test_there_are_at_least_sixty_kill_points() -> None:
    assert len(alone()) + len(together()) + 2 * len(PPO_MAX) + len(SHARDED) >= 100
