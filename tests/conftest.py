"""Fixtures: tiny models of several families; and checks of shapes and types while tests run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.figures import no_figures
from tests.runtime_checks import install

# transformers reads this when it is imported, which is later: no test uses the network
os.environ["HF_HUB_OFFLINE"] = "1"

install("rlhf")
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LONG = [Path(__file__).parent / name for name in ("device", "e2e", "faults", "rollout/vllm", "vision")]
"""Folders most of whose files take long."""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    # large weights, so that even an untrained head can favour a token
    "llama-sharp": {"initializer_range": 0.3},
    # a head size that vLLM's attention on a CPU supports
    "llama-wide": {"tie_word_embeddings": True, "hidden_size": 64, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-untied": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    # embeddings scaled by the root of their size, norm weights counted from 1, a head size of 256
    "gemma": {"head_dim": 256},
    # sliding-window attention in every layer
    "mistral": {"sliding_window": 16},
    # soft-capped logits, alternating sliding-window and full attention
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "final_logit_softcapping": 30.0,
    },
    # sliding-window attention, full attention in the last layer, a rotary table for each of the two
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files that take long begin first, so that none of them begins when the other processes are done
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.parent in LONG}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        # not `item.keywords`, which contains the names of folders too
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def save_tiny_tokenizer(folder: Path) -> int:
    """A token for each ASCII character, three special ones, a chat template; returns the vocabulary size."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # byte level, as Qwen's tokenizer classes rebuild it: a space is written Ġ, a line end Ċ
    characters = ["Ċ", "Ġ", *map(chr, range(33, 127))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_tiny_model(folder: Path, shape: str) -> None:
    """Two layers of random weights (seed 0, float32) with the tiny tokenizer, in the Hugging Face layout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab_size = save_tiny_tokenizer(folder)
    config = AutoConfig.for_model(
        shape.partition("-")[0], vocab_size=vocab_size, dtype="float32", **{**SIZES, **OWN_SIZES[shape]}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def draws_figures() -> Iterator[None]:
    """Whether reports have their figures, which take longer than most runs: only where this is overridden."""
    with pytest.MonkeyPatch.context() as patch:
        if "rlhf.trainer" in sys.modules:
            for place, name, value in no_figures():
                patch.setattr(place, name, value)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("llama")`: the folder of a tiny model of `OWN_SIZES`, made once in a test session."""

    @cache
    def folder(shape: str) -> Path:
        path = tmp_path_factory.mktemp(f"tiny-{shape}")
        save_tiny_model(path, shape)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_model: Callable[[str], Path]) -> Path:
    """The folder of a tiny Llama and its tokenizer (99 tokens, one for each character; chat template)."""
    return tiny_model("llama")
