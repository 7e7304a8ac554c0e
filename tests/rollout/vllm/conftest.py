"""What the tests of vLLM share, those of `make test` and those of `make test-faults`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.vllm.striking import Blow, check_a_loss, settings_of
from tests.rollout.vllm.support import PATIENCE
from tests.support import metrics_of, train

Lose = Callable[[int, str], None]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> list[dict[str, Any]]:
    """Steps of a run from vLLM in this process, which samples what its servers sample."""
    folder = tmp_path_factory.mktemp("undisturbed") / "vllm"
    train(settings_of(folder, tiny_model("llama-wide"), "vllm"))
    return metrics_of(folder)


@pytest.fixture
def lose_a_server(
    tmp_path: Path,
    tiny_model: Any,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Lose:
    """`lose_a_server(number, said)`: one gets it within a step. It is said, and training loses nothing."""

    def lose(number: int, said: str) -> None:
        blow, folder = Blow(monkeypatch, number), tmp_path / "run"
        with caplog.at_level(logging.WARNING):
            train(settings_of(folder, tiny_model("llama-wide"), "vllm-server", replicas=2, deadline=PATIENCE))
        messages = [record.getMessage() for record in caplog.records]
        told = [message for message in messages if "vllm server at" in message]
        check_a_loss(blow, metrics_of(folder), undisturbed, told, said)

    return lose


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import rlhf.rollout.vllm.device_transport as device
    import rlhf.rollout.vllm.pool as pool

    from . import on_cpu

    for place, name, value in on_cpu.replacements():
        monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(pool, "visible_gpus", lambda: ["0", "1"])
    # several pieces an update
    monkeypatch.setattr(device, "BUFFER", 2000)
    yield
    on_cpu.forget_shared_bytes()
