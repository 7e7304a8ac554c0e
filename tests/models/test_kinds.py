"""Tiny random models that do more than a softmax over all earlier tokens, beside their own forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.model_kinds import small_config, small_model
from benchmarks.models import groups, packed_logprobs, plain, windowed
from rlhf.config.load import make_config
from rlhf.config.model import LoraConfig, ModelConfig
from rlhf.config.section import ConfigError
from rlhf.models.loading import load_policy
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.preflight.load import load_inputs
from rlhf.rollout.factory import make_engine
from rlhf.rollout.native.engine import NativeEngine
from tests.conftest import save_tiny_tokenizer
from tests.support import ALONE, bandit_settings

Folder = Callable[..., Path]
LONGROPE = {
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder_of("opt", dropout=0.1)`: the folder of a tiny model of that kind, without a tokenizer."""

    @cache
    def saved(kind: str, settings: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        small_model(small_config(kind, **json.loads(settings))).save_pretrained(path)
        return path

    return lambda kind, **own: saved(kind, json.dumps(own))


def policy_of(folder: Path, *, longest: int | None = None, packing: str = "auto") -> Policy:
    section = ModelConfig.model_validate({"path": str(folder), "packing": packing})
    return load_policy(section, str(folder), ALONE.device, longest=longest)


def own_logprobs(folder: Path, packed: Packed) -> Tensor:
    """By the model's own forward over each sequence alone, with the attention that its code writes out."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return plain(model.eval(), packed).detach()


@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("opt", {"dropout": 0.3}),
        ("seed_oss", {"residual_dropout": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
        ("falcon", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    ],
)
def test_a_checkpointed_model_draws_nothing_at_random(folder_of: Folder, kind: str, noise: dict[str, float]):
    policy, packed = policy_of(folder_of(kind, **noise)), groups(60)
    before = packed_logprobs(policy, packed)
    policy.checkpoint_activations()
    for _ in range(2):
        again = packed_logprobs(policy, packed)
        assert again.requires_grad and torch.equal(again, before)
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize(("kind", "rope"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_sequences_that_would_change_the_rotary_factors_of_their_neighbours_are_refused(
    folder_of: Folder, kind: str, rope: dict[str, Any]
):
    folder = folder_of(kind, **rope)
    policy = policy_of(folder)
    assert policy.layout == "shared_prefix"
    ids = torch.arange(3, 68)
    fits = pack([ids[:10], ids[:40]], [[ids[:20]], [ids[:24]]])
    torch.testing.assert_close(packed_logprobs(policy, fits), own_logprobs(folder, fits), rtol=0, atol=1e-5)
    with pytest.raises(
        ModelError, match="a sequence of 65 tokens is longer than the 64 up to which the rotary"
    ):
        packed_logprobs(policy, pack([ids[:10], ids[:40]], [[ids[:20]], [ids[:25]]]))


def test_a_run_with_such_sequences_is_refused_before_weights_are_loaded(folder_of: Folder, tmp_path: Path):
    folder = folder_of("phi3", **LONGROPE)
    save_tiny_tokenizer(folder)
    config = make_config(bandit_settings(tmp_path, folder, rollout={"max_completion_tokens": 33}))
    with pytest.raises(
        ConfigError,
        match=r"= 65, but the rotary factors of .* change beyond 64 tokens \(LongRoPE or dynamic RoPE\)",
    ):
        load_inputs(config)


@pytest.mark.parametrize("window", [16, 300])
@pytest.mark.parametrize("kind", ["qwen2_moe", "phimoe"])
def test_a_sliding_window_that_a_layer_keeps_in_its_mask_is_kept_in_packed_rows(
    folder_of: Folder, kind: str, window: int
):
    folder = folder_of(kind, **windowed(kind, window))
    policy, packed = policy_of(folder), groups(512)
    assert policy.layout == "packed"
    torch.testing.assert_close(
        packed_logprobs(policy, packed), own_logprobs(folder, packed), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["qwen2_moe", "mistral"])
def test_a_window_that_no_sequence_reaches_is_none(folder_of: Folder, kind: str):
    folder = folder_of(kind, **windowed(kind, 430))
    assert policy_of(folder, longest=431).layout == "packed"
    policy, packed = policy_of(folder, longest=430), groups(512)
    assert policy.layout == "shared_prefix"
    torch.testing.assert_close(
        packed_logprobs(policy, packed), own_logprobs(folder, packed), rtol=0, atol=1e-5
    )
    assert isinstance(make_engine("native", policy.model, eos_token_ids=(), max_tokens=430), NativeEngine)
    with pytest.warns(UserWarning, match="slower engine 'hf'"):
        make_engine("native", policy.model, eos_token_ids=(), max_tokens=431)


def test_a_soft_cap_of_the_scores_is_kept_in_padded_rows(folder_of: Folder):
    folder = folder_of("gemma2", attn_logit_softcapping=0.2, query_pre_attn_scalar=1, sliding_window=16)
    policy, packed = policy_of(folder), groups(60)
    assert policy.layout == "padded"
    expected = own_logprobs(folder, packed)
    torch.testing.assert_close(packed_logprobs(policy, packed), expected, rtol=0, atol=1e-5)
    sdpa: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert (plain(sdpa.eval(), packed) - expected).abs().max() > 0.01


def test_experts_without_an_adapter_are_told_with_their_share(
    folder_of: Folder, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("peft")
    policy = policy_of(folder_of("mixtral"))
    names = dict(policy.model.named_parameters())
    share = sum(w.numel() for n, w in names.items() if ".experts." in n) / sum(
        w.numel() for w in names.values()
    )
    caplog.clear()
    policy.add_adapter(LoraConfig(rank=2, alpha=4.0), seed=0)
    assert (
        "the experts' weights (down_proj, gate_up_proj; " in caplog.text
        and f"; {share:.0%} of all" in caplog.text
    )
    with pytest.raises(
        ModelError, match=r"model\.lora\.targets has 'gate_up_proj', which is no linear layer"
    ):
        policy_of(folder_of("mixtral")).add_adapter(LoraConfig(rank=2, targets=("gate_up_proj",)), seed=0)
    caplog.clear()
    policy_of(folder_of("opt", dropout=0.3)).add_adapter(LoraConfig(rank=2), seed=0)
    assert not caplog.records
