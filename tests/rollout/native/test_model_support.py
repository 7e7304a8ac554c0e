"""Which models the native engine takes, and what happens to the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.rollout.engine import RolloutEngine, generate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.model_support import logprob_errors
from rlhf.types import FinishReason
from tests.rollout.models import EOS, request, tiny

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"sliding_window": 8, "query_pre_attn_scalar": 8}, "sliding_attention"),
    "mistral": ({"sliding_window": 16}, "sliding window of 16"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_a_model_with_another_attention_falls_back_with_one_warning(family: str) -> None:
    settings, reason = UNSUPPORTED[family]
    model = tiny(family, **settings)
    assert reason in str(NativeEngine.supports(model))
    with pytest.warns(UserWarning, match=reason) as caught:
        engine = make_engine("native", model, eos_token_ids=[EOS])
    assert len(caught) == 1
    assert isinstance(engine, HFEngine)
    requests = [request(20, n=3, max_tokens=12), request(4, n=2, max_tokens=3)]
    groups = generate(engine, requests)
    assert [len(group) for group in groups] == [3, 2]
    assert max(logprob_errors(model, requests, groups)) < 1e-4


def test_a_window_that_is_switched_off_is_no_window() -> None:
    model = tiny("qwen2", sliding_window=8, use_sliding_window=False)
    assert NativeEngine.supports(model) is None


def test_an_encoder_decoder_is_not_supported() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    assert NativeEngine.supports(model) == "it is an encoder-decoder"


def test_a_model_whose_decoding_comes_out_wrong_is_refused() -> None:
    model = tiny("llama")
    # positions that the engine does not know of: the rotation of a token depends on the length of the input
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def shifted(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(x, position_ids * x.shape[1])

    rotary.forward = shifted
    with pytest.raises(ValueError, match="log-probs of 8 tokens differ"):
        NativeEngine(model, eos_token_ids=[EOS])


def test_a_model_that_fails_in_decoding_is_refused_with_its_error() -> None:
    model = tiny("llama")
    # an attention layer that passes a window on
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "sliding_window": 4}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="its attention has a sliding window of 4"):
        NativeEngine(model, eos_token_ids=[EOS])


def test_engines_are_made_by_name() -> None:
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native, plain = (make_engine(name, model, eos_token_ids=[EOS]) for name in ("native", "hf"))
    assert isinstance(native, NativeEngine)
    assert isinstance(plain, HFEngine)
    assert isinstance(native, RolloutEngine)
    assert isinstance(plain, RolloutEngine)
    with pytest.raises(ValueError, match="expected native, hf, vllm, vllm-server, path"):
        make_engine("sglang", model, eos_token_ids=[EOS])
    with pytest.raises(ValueError, match="PreTrainedModel"):
        make_engine("hf", nn.Linear(1, 1), eos_token_ids=[EOS])


def test_what_a_model_ships_for_generation_changes_nothing() -> None:
    model = tiny("llama")
    plain = generate(HFEngine(model, eos_token_ids=[EOS]), [request(9, n=4)])
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.suppress_tokens = list(range(3, 100))
    assert generate(HFEngine(model, eos_token_ids=[EOS]), [request(9, n=4)]) == plain
    assert model.generation_config.repetition_penalty == 1.5


def test_the_plain_engine_pauses_too() -> None:
    engine = HFEngine(tiny("llama"), eos_token_ids=[EOS])
    expected = generate(engine, [request(9)])[0]
    engine.submit([request(9), request(8)])
    engine.pause("keep")
    assert engine.poll() == []
    engine.resume()
    assert engine.poll() == expected
    engine.pause("abort")
    aborted = engine.poll()
    assert [(c.prompt_id, c.finish_reason, c.token_ids) for c in aborted] == [
        ("prompt-8", FinishReason.ABORT, ())
    ] * 2
    engine.submit([request(9)])
    engine.pause("wait")
    assert engine.poll() == expected
