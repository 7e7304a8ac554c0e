"""Short runs of a tiny model, which the tests of the commands read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import bandit_settings, train


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of a run of two steps with held-out prompts; tests must only read it."""
    folder = tmp_path_factory.mktemp("finished")
    train(short_settings(folder, tiny_model_dir))
    return folder / "run"


@pytest.fixture(scope="session")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of such a run that trained a LoRA adapter; tests must only read it."""
    folder = tmp_path_factory.mktemp("adapter")
    train(short_settings(folder, tiny_model_dir, model={"lora": {"rank": 4}}, learner={"lr": 3e-2}))
    return folder / "run"


def short_settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    settings = bandit_settings(folder, model_dir, checkpoint={"export": True}, **changes)
    settings["data"]["eval"] = settings["data"]["train"]
    return settings | {"steps": 2, "eval": {"samples": 4, "max_prompts": 6}}
