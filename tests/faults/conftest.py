"""The undisturbed runs to which all disturbed ones are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import NOTICED
from tests.faults.processes import launch, result, settings_of

Straight = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Straight:
    """`straight(ranks, kind)`: the result of an undisturbed run on that many ranks."""

    @cache
    def leaves(ranks: int, kind: str = "grpo") -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"straight-{kind}-{ranks}")
        for ended in launch(settings_of(folder, tiny_model_dir, kind), folder / "log", ranks=ranks):
            assert ended.code == 0, ended.said
        return result(folder)

    return leaves


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if NOTICED:
        text = (
            f"{len(NOTICED)} ranks ended because another one was killed, {max(NOTICED):.1f} s later at most"
        )
        terminalreporter.write_line(text)
