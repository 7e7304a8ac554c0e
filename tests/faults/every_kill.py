"""Every kill point, each resumed and compared bit for bit: `make test-faults`, not part of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Straight
from tests.faults.kills import alone, killed_and_resumed, together
from tests.faults.processes import Fault


@pytest.mark.parametrize("fault", alone(), ids=str)
def test_one_rank_killed_anywhere(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 1, straight(1))


@pytest.mark.multi
@pytest.mark.parametrize("fault", together(), ids=str)
def test_one_of_two_ranks_killed_anywhere(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, fault: Fault
) -> None:
    killed_and_resumed(tmp_path, tiny_model_dir, fault, 2, straight(2))


def test_there_are_at_least_sixty_kill_points() -> None:
    assert len(alone()) + len(together()) >= 60
