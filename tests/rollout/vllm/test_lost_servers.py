"""Training from two vLLM servers, one of which is killed while samples of a step are outstanding there."""

from __future__ import annotations

import signal

import pytest

from tests.rollout.vllm.conftest import Lose
from tests.rollout.vllm.support import needs_vllm

pytestmark = [needs_vllm, pytest.mark.slow]


def test_a_server_that_is_killed_within_a_step_costs_training_nothing(lose_a_server: Lose) -> None:
    """For a frozen server see every_case.py."""
    lose_a_server(signal.SIGKILL, "does not answer")
