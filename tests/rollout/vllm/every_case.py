"""Cases of vLLM tests beside those of `make test`, and servers lost within a run: `make test-faults`."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.cli import main
from rlhf.models.adapter_files import read_adapter
from rlhf.models.packing import pack
from rlhf.rollout.vllm.in_process import VLLMModel, require_vllm
from tests.commands.test_combine import saved
from tests.rollout.conformance import TOLERANCE
from tests.rollout.models import EOS, VOCABULARY, tiny
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
    tokens = [3 + (7 * i) % 140 for i in range(40)]
    vllm = require_vllm()
    lora: Any = importlib.import_module("vllm.lora.request")
    model = VLLMModel(str(base), torch.float32, 64, VOCABULARY, (EOS,), kv_cache_gib=0.25, lora_rank=8)
    served = vllm.LLM(**model.engine_args() | {"load_format": "auto"})
    params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    asked = {"prompt_token_ids": tokens}

    def logprobs(request: Any) -> Tensor:
        (output,) = served.generate([asked], params, use_tqdm=False, lora_request=request)
        found = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        return torch.tensor([position[token].logprob for position, token in found])

    with_sum = logprobs(lora.LoRARequest("sum", 1, str(tmp_path / "sum")))
    learner = policy_of(base)
    with torch.no_grad():
        for layer, (down, up) in read_adapter(tmp_path / "sum").layers.items():
            learner.model.get_submodule(layer).get_parameter("weight").add_(up @ down)
    packed = pack([torch.tensor(tokens[:1])], [[torch.tensor(tokens[1:])]])
    expected = learner.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert expected is not None
    assert (with_sum - expected.detach()).abs().max() < TOLERANCE
    # without it, the model is another one
    assert (logprobs(None) - with_sum).abs().max() > 0.1
