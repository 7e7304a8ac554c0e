"""Tiny random models that do more than a softmax over all earlier tokens, beside their own forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.model_kinds import small_config, small_model
from benchmarks.models import groups, packed_logprobs, plain, sequences, windowed
from rlhf.config.load import make_config
from rlhf.config.model import LoraConfig, ModelConfig
from rlhf.config.section import ConfigError
from rlhf.models.loading import LAYOUTS, load_policy
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError, load_tokenizer
from rlhf.models.vision.processor import Reader
from rlhf.preflight.load import load_inputs
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.model_support import logprob_errors
from rlhf.types import Prompt
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


def merged_error(folder: Path) -> float:
    """The largest difference of log-probs under an adapter from those of the merged model, in nats."""
    policy = policy_of(folder)
    policy.add_adapter(LoraConfig(rank=2, alpha=4.0), seed=0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    policy.merge()
    merged: Any = policy.rollout_model
    merged.set_attn_implementation("eager")
    return float((packed_logprobs(policy, groups(40)) - plain(merged, groups(40))).abs().max().detach())


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        # peft would put adapters of its own beside the experts in place of these layers
        ("dots1", "down_proj gets no adapter: peft takes layers of this name for experts"),
        ("mamba", "dt_proj gets no adapter: its weight is used without calling the layer"),
        # its router is a linear layer that returns several tensors
        ("phimoe", "the experts' weights (down_proj, gate_up_proj; 79% of all) are no linear layers"),
    ],
)
def test_layers_that_cannot_have_an_adapter_get_none_and_are_told(
    folder_of: Folder, kind: str, left_out: str, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("peft")
    assert merged_error(folder_of(kind)) < 1e-4
    assert left_out in caplog.text


def test_an_adapter_for_a_model_without_linear_layers_is_refused(folder_of: Folder):
    pytest.importorskip("peft")
    with pytest.raises(
        ModelError, match="GPT2LMHeadModel has no linear layer below its head that can have an"
    ):
        policy_of(folder_of("gpt2")).add_adapter(LoraConfig(rank=2), seed=0)


def test_a_model_that_sees_later_tokens_is_refused(folder_of: Folder):
    with pytest.raises(ModelError, match="depends on the tokens after it: this is no causal language model"):
        policy_of(folder_of("bert-generation"))


def test_decoding_without_a_cache_takes_the_place_of_decoding_that_is_wrong(folder_of: Folder):
    """RWKV's cached states are not those of its forward over the whole sequence."""
    policy = policy_of(folder_of("rwkv"))
    with pytest.warns(UserWarning, match="every token is computed without a cache instead"):
        engine = make_engine("hf", policy.model, eos_token_ids=())
    prompt = Prompt("p", tuple(range(3, 20)), "")
    requests = [RolloutRequest(prompt, SamplingParams(n=2, max_tokens=6, seed=0))]
    assert max(logprob_errors(policy.model, requests, generate(engine, requests))) < 1e-4


@pytest.mark.parametrize(
    "kind", ["qwen3_next", "mamba2", "zamba2", "granitemoehybrid", "nemotron", "llama4_text"]
)
def test_a_layer_that_cannot_be_replaced_is_left_as_it_is(folder_of: Folder, kind: str):
    """Gated norms, norms of two arguments, chunked attention, a transformer under an unusual name."""
    folder = folder_of(kind)
    policy, packed = policy_of(folder), groups(60)
    got, expected = packed_logprobs(policy, packed), own_logprobs(folder, packed)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("llama", {}),
        ("qwen2_moe", {}),
        ("gemma3_text", {"sliding_window": 16}),
        ("gpt_oss", {"sliding_window": 16}),
        ("deepseek_v3", {}),
        ("qwen3_next", {}),
        ("mamba2", {}),
        ("bloom", {}),
    ],
)
def test_no_logprob_depends_on_the_other_rows_of_its_microbatch(
    folder_of: Folder, kind: str, own: dict[str, Any]
):
    """Full and sliding attention, sinks, latent attention, experts, states, positions in a bias."""
    folder, packed = folder_of(kind, **own), groups(60)
    for layout in LAYOUTS:
        try:
            policy = policy_of(folder, packing=layout)
        except ModelError:
            assert layout != "padded"
            continue
        together = packed_logprobs(policy, packed).detach()
        alone = [packed_logprobs(policy, pack([p], [[c]])).detach() for p, c in sequences(packed)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)


def test_text_teaches_a_model_that_sees_and_leaves_its_tower_alone(folder_of: Folder, tmp_path: Path):
    """Gemma-3, whose images are not supported: its tower is not in the optimizer, its processor is kept."""
    folder, packed = folder_of("gemma3"), groups(60)
    policy = policy_of(folder)
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    expected = plain(whole.eval(), packed).detach()
    torch.testing.assert_close(packed_logprobs(policy, packed), expected, rtol=0, atol=1e-5)
    names = dict(policy.model.named_parameters())
    learns = {name for name, weight in names.items() if weight.requires_grad}
    assert learns == {name for name in names if "language_model" in name}
    save_tiny_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    Reader(str(folder), load_tokenizer(str(folder))).save_pretrained(str(tmp_path / "out"))
    assert {"tokenizer.json", "preprocessor_config.json"} <= {f.name for f in (tmp_path / "out").iterdir()}
    settings = bandit_settings(tmp_path, folder)
    with closing(load_inputs(make_config(settings)).rewards):
        content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
        row = {"prompt": [{"role": "user", "content": content}]}
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="the prompt has images, but the model has no image processor"):
        load_inputs(make_config(settings))


def test_a_model_that_no_engine_in_this_process_decodes_is_refused(folder_of: Folder):
    """PaliGemma's `generate` lets a prompt see itself in both directions, its plain forward does not."""
    policy = policy_of(folder_of("paligemma"))
    with pytest.raises(ValueError, match="the engine hf cannot decode PaliGemma"):
        make_engine("hf", policy.model, eos_token_ids=())
