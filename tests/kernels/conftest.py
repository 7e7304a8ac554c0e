"""Fixtures of the kernel tests: uninitialised memory is filled with NaN, and tiles can be made small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlhf.kernels.token_stats import tile_sizes


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic  # its class, with the property, is swapped in at import
    assert settings.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 tokens by 16 columns, so that small problems have many of both."""
    monkeypatch.setattr(tile_sizes, "CPU_ROWS", 4)
    monkeypatch.setattr(tile_sizes, "COLUMN_STEP", 16)
    monkeypatch.setattr(tile_sizes, "CPU_TILE_BYTES", 4 * 16 * 4)
