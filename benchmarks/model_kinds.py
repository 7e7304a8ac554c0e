"""Tiny random models of every kind of language model that transformers knows: a few layers, 99 tokens."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from rlhf.preflight.trial import STATE

VOCABULARY = 99
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size", "dense_intermediate_size"), 16),
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_window_layers": 1,
    "depth": 2,
    "out_hidden_size": 32,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("index_head_dim", "index_topk"), 8),
    "index_n_heads": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
}
"""Sizes for all kinds; each kind takes those that its config has."""

MOST = 30_000_000
"""Weights of a model that is still small."""
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# latent attention (MLA): rotary factors are as wide as the rotary part of a head, and every head has keys
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
MROPE = {"mrope_section": [2, 1, 1]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "mistral4"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **MROPE}},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LINEAR, "head_dim": 4, "num_key_value_heads": 4, "q_lora_rank": None, "n_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "autocast_kernel_dtype": "float32"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a kind needs beside `SMALL`."""


def language_models() -> Iterator[str]:
    """The `model_type` of every causal language model of the installed transformers.

    Encoders and parts of encoder-decoders are left out, which transformers can run as decoders, but which
    write no text by themselves; so are models that see or hear beside reading.
    """
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    others = {
        *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        *auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    }
    yield from (kind for kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in others)


def seeing_models() -> Iterator[str]:
    """The `model_type` of every model of the installed transformers that reads images and writes text."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    yield from auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def small_config(kind: str, **own: Any) -> Any:
    """The config of a tiny model of that kind; `own` settings come before the small ones."""
    auto: Any = transformers.AutoConfig
    return auto.for_model(kind, **{**_small(type(auto.for_model(kind))), "dtype": "float32", **own})


def _small(kind: Any) -> dict[str, Any]:
    """Small settings for a class of configs, and for the configs of its parts."""
    default = kind().to_dict()
    small = {name: value for name, value in SMALL.items() if name in default}
    parts = {name: getattr(kind(), name) for name in kind.sub_configs}
    parts = {name: _small(type(part)) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    return {**small, **parts, **OWN.get(kind.model_type, {})}


def auto_class(config: Any) -> Any:
    """The class of transformers that loads the whole of a model, its vision tower included."""
    sees = "vision_config" in config.to_dict()
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def small_model(config: Any, *, seed: int = 0, sharpness: float = 8.0) -> Any:
    """A causal language model with random weights, in evaluation mode.

    `sharpness` multiplies the matrices in the layers: attention that is far from uniform shows which tokens
    are seen.
    """
    kind: Any = auto_class(config)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"a {config.model_type} is not small with these settings: {size} weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind.from_config(config)
    outside = {
        id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (
                weight.dim() in (2, 3)
                and id(weight) not in outside
                and not any(part in name for part in STATE)
            ):
                weight.mul_(sharpness)
    return model.eval()
