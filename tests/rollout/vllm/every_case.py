"""Cases of vLLM tests beside those of `make test`, and servers lost within a run: `make test-faults`."""

from __future__ import annotations

import signal

import pytest

from tests.rollout.vllm.conftest import Lose
from tests.rollout.vllm.support import needs_vllm
from tests.rollout.vllm.test_transport import check_both_ends

pytestmark = needs_vllm


def test_a_server_that_is_killed_within_a_step_costs_training_nothing(lose_a_server: Lose) -> None:
    lose_a_server(signal.SIGKILL, "does not answer")


def test_a_server_that_is_frozen_within_a_step_costs_training_nothing(lose_a_server: Lose) -> None:
    lose_a_server(signal.SIGSTOP, "returned no sample for 20 s: it is frozen")


def test_both_ends_agree_on_a_cpu_by_ipc(tmp_path_factory: pytest.TempPathFactory, on_cpu: None) -> None:
    check_both_ends(tmp_path_factory, "ipc", 1)


def test_both_ends_agree_on_a_cpu_with_two_servers(
    tmp_path_factory: pytest.TempPathFactory, on_cpu: None
) -> None:
    check_both_ends(tmp_path_factory, "nccl", 2)
