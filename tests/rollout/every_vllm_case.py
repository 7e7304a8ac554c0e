"""What tests of vLLM show in one of two cases, in the other one: `make test-faults`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support import metrics_of

from .test_vllm_losses import check_a_loss, train_and_lose, undisturbed
from .test_vllm_transport import check_both_ends, on_cpu
from .vllm_support import needs_vllm

pytestmark = needs_vllm
__all__ = ["on_cpu", "undisturbed"]


def test_a_server_that_is_frozen_within_a_step_costs_training_nothing(
    tmp_path: Path,
    tiny_model: Any,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        blow = train_and_lose(tmp_path, tiny_model("llama-wide"), signal.SIGSTOP, monkeypatch)
    said = "gave no sample for 20 s: it is frozen"
    check_a_loss(blow, metrics_of(tmp_path / "run"), undisturbed, caplog, said)


def test_both_ends_agree_on_a_cpu_by_ipc(
    tmp_path_factory: pytest.TempPathFactory,
    on_cpu: None,
) -> None:
    check_both_ends(tmp_path_factory, "ipc", 1)
