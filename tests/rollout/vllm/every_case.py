"""Cases of vLLM tests beside those of `make test`, and servers lost within a run: `make test-faults`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.cli import main
from rlhf.models.adapter_files import read_adapter
from rlhf.rollout.engine import generate
from rlhf.rollout.vllm.adapter import adapter_request
from rlhf.rollout.vllm.in_process import VLLMEngine, VLLMModel
from tests.commands.test_combine import saved
from tests.rollout.conformance import TOLERANCE, worst
from tests.rollout.models import EOS, VOCABULARY, request, tiny
from tests.rollout.vllm.conftest import Lose
from tests.rollout.vllm.support import needs_vllm
from tests.rollout.vllm.test_transport import check_both_ends
from tests.support import policy_of

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


def test_the_sum_of_two_adapters_is_served_as_the_learner_computes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rlhf combine` writes what vLLM's own loader takes: the folder is given to it as a user would."""
    pytest.importorskip("peft")
    base = tmp_path / "base"
    shape: dict[str, Any] = {"head_dim": 32, "hidden_size": 128, "tie_word_embeddings": True}
    tiny("llama", **shape).save_pretrained(base)
    saved(tmp_path / "a", base)
    saved(tmp_path / "bb", base, r=2, lora_alpha=6, target_modules=["v_proj", "down_proj"])
    named = [f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'bb'}=-1.5"]
    assert main(["combine", *named, "--out", str(tmp_path / "sum")]) == 0, capsys.readouterr().err
    settings = VLLMModel(
        str(base), torch.float32, 128, VOCABULARY, (EOS,), 0.25, args={"load_format": "auto"}, lora_rank=8
    )
    engine: Any = VLLMEngine(settings)
    # what requests name is a folder of adapters, which vLLM reads by itself
    engine._adapter = adapter_request(str(tmp_path / "sum"))
    try:
        requests = [request(9, n=2), request(30, n=2)]
        groups = generate(engine, requests)
    finally:
        engine.close()
    learner = policy_of(base).model
    assert worst(learner, requests, groups) > 0.1
    with torch.no_grad():
        for layer, (down, up) in read_adapter(tmp_path / "sum").layers.items():
            learner.get_submodule(layer).get_parameter("weight").add_(up @ down)
    assert worst(learner, requests, groups) < TOLERANCE
