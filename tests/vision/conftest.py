from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.vision_models import save_tiny_vlm


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_vlm("qwen2_vl")`, or another of `FAMILIES`: the folder of one, made once a session."""

    @cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp(f"tiny-{family}")
        save_tiny_vlm(path, family)
        return path

    return folder
