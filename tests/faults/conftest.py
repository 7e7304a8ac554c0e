"""The runs that were never stopped, to which all others are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import launch, result, settings_of

Straight = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Straight:
    """`straight(ranks)`: what a run of that many ranks leaves when nothing happens to it."""

    @cache
    def leaves(ranks: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"straight-{ranks}")
        for ended in launch(settings_of(folder, tiny_model_dir), folder / "log", ranks=ranks):
            assert ended.code == 0, ended.said
        return result(folder)

    return leaves
