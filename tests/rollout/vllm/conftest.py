"""Fixtures of the vLLM tests of `make test` and `make test-faults`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.vllm.striking import Strike, check_a_loss, settings_of
from tests.rollout.vllm.support import PATIENCE
from tests.support import metrics_of, train

Lose = Callable[[int, str], None]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> list[dict[str, Any]]:
    """Metrics of a run with vLLM in this process, which draws the same samples as its servers."""
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
    """`lose_a_server(signal, text)`: one server gets the signal within a step; the log has the text, and no
    sample is lost."""

    def lose(number: int, said: str) -> None:
        strike, folder = Strike(monkeypatch, number), tmp_path / "run"
        with caplog.at_level(logging.WARNING):
            train(settings_of(folder, tiny_model("llama-wide"), "vllm-server", replicas=2, deadline=PATIENCE))
        messages = [record.getMessage() for record in caplog.records]
        told = [message for message in messages if "vllm server at" in message]
        check_a_loss(strike, metrics_of(folder), undisturbed, told, said)

    return lose


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import rlhf.rollout.vllm.device_transport as device
    import rlhf.rollout.vllm.server_pool as pool

    from . import on_cpu

    for place, name, value in on_cpu.replacements():
        monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(pool, "visible_gpus", lambda: ["0", "1"])
    # small, so that an update is sent in several pieces
    monkeypatch.setattr(device, "BUFFER", 2000)
    yield
    on_cpu.forget_shared_bytes()
