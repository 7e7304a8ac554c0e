"""Tiny random models, and requests with all kinds of lengths, group sizes and sampling settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf.rollout.engine import RolloutRequest, SamplingParams
from rlhf.types import Prompt

EOS = 2
VOCABULARY = 150  # not a multiple of the sampler's block
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # logits with some contrast: an untrained model would sample almost uniformly
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Two layers of random weights (seed 0)."""
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def prompt(length: int, name: str = "") -> Prompt:
    """A prompt of that length, with token ids that depend on the length."""
    ids = tuple((5 + length * i + i * i) % VOCABULARY for i in range(length))
    return Prompt(id=name or f"prompt-{length}", token_ids=ids, content="")


def request(length: int, name: str = "", *, mixture: float = 0.0, **settings: Any) -> RolloutRequest:
    """A request whose seed is the length of its prompt unless `settings` has one."""
    params = SamplingParams(**{"n": 2, "max_tokens": 12, "seed": length, **settings})
    return RolloutRequest(prompt(length, name), params, mixture=mixture)


def ragged() -> list[RolloutRequest]:
    """Prompts of 1 to 40 tokens, groups of 1 to 6, limits of 1 to 80 tokens, every way of sampling."""
    return [
        request(9, n=3, max_tokens=20),
        request(1, n=1, max_tokens=80, temperature=0.7),
        request(17, n=6, max_tokens=5, stop_token_ids=(7, 9, 30, 31, 32)),
        request(3, n=2, max_tokens=1),
        request(40, n=4, max_tokens=30, temperature=1.3, top_p=0.8),
        request(12, n=2, max_tokens=15, top_k=5),
        request(13, n=2, max_tokens=15, top_k=20, top_p=0.6, temperature=2.0),
        request(14, n=2, max_tokens=15, top_k=30, min_p=0.05, return_candidates=True),
        request(6, n=2, max_tokens=10, temperature=0.0, top_p=0.5),
    ]


def untruncated(requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
    """The requests without truncation, whose log-probs are over the whole vocabulary."""
    return [r for r in requests if not r.params.truncates]
