"""The native engine against its specification, `hf.py`, and against forwards over whole sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.rollout.engine import RolloutEngine, RolloutRequest, generate
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.native import cpu_linear
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.model_support import logprob_errors
from rlhf.types import Completion, FinishReason, VersionSpan
from tests.rollout.models import EOS, ragged, request, tiny, untruncated

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {"num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def engine(llama: PreTrainedModel) -> NativeEngine:
    return NativeEngine(llama, eos_token_ids=[EOS])


class Source:
    """A `WeightSource` of a plain module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters()


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def drain(engine: RolloutEngine) -> list[Completion]:
    completions: list[Completion] = []
    while polled := engine.poll():
        completions.extend(polled)
    return completions


def same(first: Sequence[Sequence[Completion]], second: Sequence[Sequence[Completion]]) -> None:
    """Asserts the same tokens and finish reasons, with log-probs within 1e-4."""
    assert tokens(first) == tokens(second)
    for a, b in zip((c for g in first for c in g), (c for g in second for c in g), strict=True):
        assert (a.prompt_id, a.index, a.finish_reason, a.versions) == (
            b.prompt_id,
            b.index,
            b.finish_reason,
            b.versions,
        )
        assert a.rollout_logprobs == pytest.approx(b.rollout_logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_are_those_of_plain_generate(family: str) -> None:
    model = tiny(family, **FAMILIES[family])
    native = generate(NativeEngine(model, eos_token_ids=[EOS]), ragged())
    same(native, generate(HFEngine(model, eos_token_ids=[EOS]), ragged()))
    assert {c.finish_reason for g in native for c in g} == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_forward_over_the_whole_sequence(family: str) -> None:
    model = tiny(family, **FAMILIES[family])
    requests = untruncated(ragged())
    groups = generate(NativeEngine(model, eos_token_ids=[EOS]), requests)
    assert max(logprob_errors(model, requests, groups)) < 1e-4


def test_a_request_samples_the_same_tokens_whatever_else_is_in_the_batch(engine: NativeEngine) -> None:
    together = generate(engine, ragged())
    same(together, [generate(engine, [r])[0] for r in ragged()])
    same(list(reversed(together)), generate(engine, list(reversed(ragged()))))


def test_a_sample_does_not_depend_on_the_size_of_its_group(engine: NativeEngine) -> None:
    assert (
        tokens(generate(engine, [request(9, n=5)]))[0][:2] == tokens(generate(engine, [request(9, n=2)]))[0]
    )


def test_another_seed_samples_other_tokens(engine: NativeEngine) -> None:
    (first,), (second,) = (generate(engine, [request(9, n=4, seed=seed)]) for seed in (1, 2))
    assert not {c.token_ids for c in first} & {c.token_ids for c in second}


def test_the_stop_token_belongs_to_the_completion(engine: NativeEngine) -> None:
    (group,) = generate(engine, [request(9, n=16, max_tokens=40, stop_token_ids=(7, 9, 30, 31, 32))])
    stopped = [c for c in group if c.finish_reason is FinishReason.STOP]
    assert stopped
    for completion in stopped:
        assert completion.token_ids[-1] in (EOS, 7, 9, 30, 31, 32)
        assert not {EOS, 7, 9, 30, 31, 32} & set(completion.token_ids[:-1])
    assert all(len(c.token_ids) == 40 for c in group if c.finish_reason is FinishReason.LENGTH)


def test_a_group_is_handed_over_while_others_are_decoded(engine: NativeEngine) -> None:
    engine.submit([request(9, n=2, max_tokens=60, stop_token_ids=()), request(4, n=3, max_tokens=2)])
    first = engine.poll()
    assert {c.prompt_id for c in first} == {"prompt-4"}
    assert len(first) == 3
    assert {c.prompt_id for c in drain(engine)} == {"prompt-9"}
    assert engine.poll() == []


def test_requests_submitted_while_others_are_decoded_join_them(llama: PreTrainedModel) -> None:
    engine = NativeEngine(llama, eos_token_ids=[])
    engine.submit([request(9, max_tokens=30), request(4, max_tokens=3)])
    engine.poll()
    engine.submit([request(5, max_tokens=40), request(6, n=3, max_tokens=4)])
    late = drain(engine)
    assert [c.prompt_id for c in late] == ["prompt-6"] * 3 + ["prompt-9"] * 2 + ["prompt-5"] * 2
    alone = [
        c
        for r in (request(6, n=3, max_tokens=4), request(9, max_tokens=30), request(5, max_tokens=40))
        for c in generate(engine, [r])[0]
    ]
    assert [c.token_ids for c in sorted(late, key=lambda c: (c.prompt_id, c.index))] == [
        c.token_ids for c in sorted(alone, key=lambda c: (c.prompt_id, c.index))
    ]


def test_groups_beyond_the_memory_wait_and_sample_the_same(llama: PreTrainedModel) -> None:
    # 2 layers x (key, value) x 2 heads x 8 numbers x 4 bytes = 256 bytes a token; 160 tokens fit
    small = NativeEngine(llama, eos_token_ids=[EOS], kv_cache_gib=160 * 256 / 2**30)
    requests = [request(10 + i, n=3, max_tokens=20) for i in range(5)]
    small.submit(requests)
    small.poll(timeout=0.0)
    assert [len(cohort.cache.prompt_lengths) for cohort in small._cohorts] == [2]
    assert len(small._waiting) == 3
    small.pause("abort")
    drain(small)
    small.resume()
    same(generate(small, requests), generate(NativeEngine(llama, eos_token_ids=[EOS]), requests))


def test_a_group_that_can_never_fit_is_refused(llama: PreTrainedModel) -> None:
    small = NativeEngine(llama, eos_token_ids=[EOS], kv_cache_gib=160 * 256 / 2**30)
    with pytest.raises(ValueError, match="kv_cache_gib"):
        small.submit([request(4, max_tokens=4), request(100, n=10, max_tokens=20)])
    assert small.poll() == []


def test_abort_returns_what_was_sampled(engine: NativeEngine) -> None:
    engine.submit([request(9, n=2, max_tokens=50), request(4, n=2, max_tokens=2)])
    engine.poll()
    engine.pause("abort")
    aborted = engine.poll()
    assert [c.finish_reason for c in aborted] == [FinishReason.ABORT] * 2
    whole = generate_after_resume(engine, [request(9, n=2, max_tokens=50)])[0]
    assert [c.token_ids for c in aborted] == [c.token_ids[:2] for c in whole]


def generate_after_resume(engine: NativeEngine, requests: list[RolloutRequest]) -> list[list[Completion]]:
    engine.resume()
    return generate(engine, requests)


def test_wait_decodes_to_the_end_and_keep_continues(engine: NativeEngine) -> None:
    expected = generate(engine, [request(9)])
    engine.submit([request(9)])
    engine.pause("wait")
    assert [c.token_ids for c in engine.poll()] == [c.token_ids for c in expected[0]]
    engine.resume()
    engine.submit([request(9)])
    engine.poll(timeout=0.0)
    engine.pause("keep")
    assert engine.poll() == []
    engine.resume()
    assert sorted(c.token_ids for c in drain(engine)) == sorted(c.token_ids for c in expected[0])


def test_versions_say_which_weights_sampled_which_tokens(llama: PreTrainedModel) -> None:
    engine = NativeEngine(llama, eos_token_ids=[])
    engine.submit([request(9, n=1, max_tokens=6)])
    engine.poll(timeout=0.0)
    report = engine.update_weights(Source(llama), 3)
    assert (report.version, report.bytes) == (3, 0)
    (completion,) = drain(engine)
    assert completion.versions == (VersionSpan(0, 0, 2), VersionSpan(3, 2, 6))


@pytest.mark.parametrize("kind", [NativeEngine, HFEngine])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_another_module_are_copied(kind: Any, tied: bool) -> None:
    learner, own = tiny("qwen2", tie_word_embeddings=tied), tiny("qwen2", tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(torch.full_like(parameter, 0.05).cumsum(0))
    engine = kind(own, eos_token_ids=[EOS])
    report = engine.update_weights(Source(learner), 1)
    assert report.bytes == sum(p.nbytes for p in learner.parameters())
    requests = [request(9)]
    groups = generate(engine, requests)
    assert max(logprob_errors(learner, requests, groups)) < 1e-4
    assert groups[0][0].versions == (VersionSpan(1, 0, len(groups[0][0].token_ids)),)


def test_weights_that_do_not_fit_are_refused() -> None:
    engine = HFEngine(tiny("llama"), eos_token_ids=[EOS])
    with pytest.raises(ValueError, match="does not have"):
        engine.update_weights(Source(tiny("qwen2")), 1)
    with pytest.raises(ValueError, match="in the learner and"):
        engine.update_weights(Source(tiny("llama", intermediate_size=16)), 1)


@pytest.mark.parametrize("kind", [NativeEngine, HFEngine])
def test_the_learner_finds_its_module_as_it_left_it(kind: Any) -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    engine = kind(model, eos_token_ids=[EOS])
    model.train()
    model.model.layers[0].eval()
    generate(engine, [request(9)])
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_global_generator_is_left_alone(engine: NativeEngine) -> None:
    before = torch.random.get_rng_state()
    generate(engine, [request(9)])
    assert torch.equal(before, torch.random.get_rng_state())


def test_completions_longer_than_a_chunk_of_the_cache(llama: PreTrainedModel) -> None:
    requests = [request(5, n=3, max_tokens=200), request(11, n=2, max_tokens=130)]
    native, plain = (generate(kind(llama, eos_token_ids=[]), requests) for kind in (NativeEngine, HFEngine))
    same(native, plain)


def test_in_bfloat16_logprobs_are_within_the_rounding() -> None:
    model = tiny("llama", torch.bfloat16, initializer_range=0.1)
    requests = [request(9, n=4), request(30, n=4)]
    engines = [kind(model, eos_token_ids=[]) for kind in (NativeEngine, HFEngine)]
    native, plain = [logprob_errors(model, requests, generate(e, requests)) for e in engines]
    assert sum(native) < 2 * sum(plain) + 0.01 * len(native)


@pytest.mark.parametrize("kind", [NativeEngine, HFEngine])
def test_bad_requests_are_refused(llama: PreTrainedModel, kind: Any) -> None:
    engine = kind(llama, eos_token_ids=[EOS])
    engine.submit([request(9)])
    with pytest.raises(ValueError, match="in flight already"):
        engine.submit([request(9)])
    with pytest.raises(ValueError, match="in flight already"):
        engine.submit([request(8), request(8)])
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit([request(0)])
    engine.close()
    assert engine.poll() == []


def test_a_peft_model_samples_with_its_adapters() -> None:
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    plain = generate(NativeEngine(base, eos_token_ids=[EOS]), [request(9, n=4)])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    groups = generate(NativeEngine(model, eos_token_ids=[EOS]), [request(9, n=4)])
    assert tokens(groups) != tokens(plain)
    assert max(logprob_errors(model.get_base_model(), [request(9, n=4)], groups)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_follow_the_weights_they_were_made_from(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """oneDNN packs float32 on every CPU, and bfloat16 where there are instructions for it."""
    model = tiny("qwen2", dtype, initializer_range=0.1)
    if dtype == torch.float32:
        monkeypatch.setattr(cpu_linear, "can_pack", lambda weight: type(weight) is nn.Parameter)
    elif not any(map(cpu_linear.can_pack, model.parameters())):
        pytest.skip("needs a CPU that computes in bfloat16; float32 is packed on this one")
    engine = NativeEngine(model, eos_token_ids=[])
    assert engine._decoder.linears._linears
    requests = [request(9, n=4), request(30, n=4)]
    before = generate(engine, requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.update_weights(Source(model), 1)
    after = generate(engine, requests)
    assert tokens(after) != tokens(before)
    plain = logprob_errors(model, requests, generate(HFEngine(model, eos_token_ids=[]), requests))
    assert sum(logprob_errors(model, requests, after)) < 2 * sum(plain) + 0.01 * len(plain)
    engine.release()
    same(generate(engine, requests), after)
    assert not any("forward" in vars(module) for module in model.modules())
