"""Engines that sample from the geometric mixture of two models: laws, and two forwards per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rlhf.config.model import LoraConfig
from rlhf.models.lora import Adapter
from rlhf.rollout.engine import EngineError, RolloutRequest, SyncReport, WeightSource, generate
from rlhf.rollout.factory import mixture_engine
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.mixture import HFMixtureEngine, OtherModel, check_mixable, mixed_logits
from rlhf.rollout.native import cpu_linear
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.mixture import NativeMixtureEngine
from rlhf.rollout.sampling import truncate
from rlhf.types import Completion, FinishReason, Prompt
from tests.rollout.conformance import (
    Check,
    Source,
    check_abort_returns_what_was_sampled,
    check_bad_requests_are_refused_and_nothing_is_submitted,
    check_groups_are_handed_over_whole,
    check_the_weights_in_force_are_those_of_the_last_update,
    check_wait_decodes_to_the_end_and_keep_continues,
    check_weights_in_flight_are_told_apart,
    conforming_model,
    moved,
    tokens,
)
from tests.rollout.models import EOS, ragged, request, tiny

KINDS = [NativeMixtureEngine, HFMixtureEngine]
WEIGHTS = (0.3, 0.125, 0.9, 0.0, 1.0)


def other_tiny(family: str = "qwen2", **settings: Any) -> PreTrainedModel:
    """A model of another family, with one layer more and other key-value heads, and the same vocabulary."""
    return tiny(family, num_hidden_layers=3, num_key_value_heads=1, **settings)


def asked(weight: float | None = None) -> list[RolloutRequest]:
    """All kinds of requests with one weight, or each with another one."""
    return [
        mixing(r, WEIGHTS[i % len(WEIGHTS)] if weight is None else weight, min(r.params.max_tokens, 16))
        for i, r in enumerate(ragged())
    ]


def mixing(plain: RolloutRequest, weight: float, max_tokens: int) -> RolloutRequest:
    return replace(plain, params=replace(plain.params, max_tokens=max_tokens), mixture=weight)


def logits_of(model: nn.Module, asked: RolloutRequest, completion: Completion) -> Tensor:
    ids = torch.tensor([asked.prompt.token_ids + completion.token_ids])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, len(asked.prompt.token_ids) - 1 : -1]


def expected_logprobs(
    policy: Tensor, other: Tensor, asked: RolloutRequest, completion: Completion
) -> list[float]:
    """Of a completion's tokens, by the formula, from the logits `[T, V]` of two whole forwards."""
    params, weight = asked.params, asked.mixture
    mixed = (1 - weight) * policy.log_softmax(-1) + weight * other.log_softmax(-1)
    probs = (mixed / (params.temperature or 1.0)).softmax(-1)
    if params.truncates:
        size = (len(probs),)
        top_p = torch.full(size, params.top_p, dtype=torch.float64)
        probs = truncate(probs, torch.full(size, params.top_k), top_p, torch.full(size, params.min_p))
    chosen = torch.tensor(completion.token_ids)[:, None]
    return (probs / probs.sum(-1, keepdim=True)).gather(1, chosen)[:, 0].log().tolist()


def check_logprobs(
    policy: nn.Module,
    other: OtherModel,
    requests: Sequence[RolloutRequest],
    groups: Sequence[Sequence[Completion]],
    atol: float = 2e-5,
) -> None:
    for r, group in zip(requests, groups, strict=True):
        for completion in group:
            own = logits_of(policy, r, completion)
            others = logits_of(other.module, r, completion)
            expected = expected_logprobs(own, others, r, completion)
            assert completion.rollout_logprobs == pytest.approx(expected, abs=atol)


def test_a_mixture_is_the_normalised_geometric_mean() -> None:
    # with weight 1/2: square roots .7746 .5477 .3162 of the policy, equal factors of the other; sum 1.6385
    policy, uniform = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.zeros(1, 3)
    mixed = mixed_logits(policy, uniform, torch.tensor([0.5])).softmax(-1)
    assert mixed[0].tolist() == pytest.approx([0.4727, 0.3343, 0.1930], abs=1e-4)
    # sqrt(.6 x .2) = .3464, sqrt(.3 x .3) = .3, sqrt(.1 x .5) = .2236; sum .8700
    other = torch.tensor([[0.2, 0.3, 0.5]]).log()
    mixed = mixed_logits(policy + 7, other - 3, torch.tensor([0.5])).softmax(-1)
    assert mixed[0].tolist() == pytest.approx([0.3982, 0.3448, 0.2570], abs=1e-4)


def test_a_token_that_one_model_cannot_sample_is_only_sampled_without_that_model() -> None:
    never, ones = torch.tensor([[0.0, -torch.inf]] * 3), torch.ones(3, 2)
    weights = torch.tensor([0.0, 0.5, 1.0])
    assert mixed_logits(ones, never, weights).tolist() == [[1, 1], [0.5, -torch.inf], [0, -torch.inf]]
    assert mixed_logits(never, ones, weights).tolist() == [[0, -torch.inf], [0.5, -torch.inf], [1, 1]]


def test_weight_0_is_bitwise_the_policy_and_weight_1_bitwise_the_other() -> None:
    policy, other = tiny("llama"), other_tiny()
    engine = NativeMixtureEngine(policy, OtherModel(other), eos_token_ids=[EOS])
    for weight, model in ((0.0, policy), (1.0, other)):
        alone = generate(NativeEngine(model, eos_token_ids=[EOS]), asked(0.0))
        assert generate(engine, asked(weight)) == alone
    hf = HFMixtureEngine(policy, OtherModel(other), eos_token_ids=[EOS])
    few = slice(1, 4)
    assert generate(hf, asked(0.0)[few]) == generate(HFEngine(policy, eos_token_ids=[EOS]), asked(0.0)[few])
    assert tokens(generate(hf, asked(1.0)[few])) == tokens(generate(engine, asked(1.0)[few]))


def test_native_samples_the_tokens_of_the_specification_with_the_logprobs_of_two_forwards() -> None:
    policy, other = tiny("llama"), OtherModel(other_tiny())
    native, plain = (generate(kind(policy, other, eos_token_ids=[EOS]), asked()) for kind in KINDS)
    assert tokens(native) == tokens(plain)
    check_logprobs(policy, other, asked(), native)
    check_logprobs(policy, other, asked(), plain)
    assert {c.finish_reason for group in native for c in group} == {FinishReason.STOP, FinishReason.LENGTH}
    alone = NativeMixtureEngine(policy, other, eos_token_ids=[EOS])
    assert tokens([generate(alone, [r])[0] for r in asked()[-3:]]) == tokens(native[-3:])


def test_candidates_are_those_of_the_mixture() -> None:
    policy, other = tiny("llama"), OtherModel(other_tiny())
    cut = request(9, n=3, top_k=5, return_candidates=True, mixture=0.3)
    for kind in KINDS:
        (group,) = generate(kind(policy, other, eos_token_ids=[EOS]), [cut])
        for completion in group:
            own, others = (logits_of(m, cut, completion) for m in (policy, other.module))
            assert completion.candidates is not None
            expected = (0.7 * own.log_softmax(-1) + 0.3 * others.log_softmax(-1)).topk(5).indices
            said = completion.candidates.each()
            assert [sorted(ids.tolist()) for ids in said] == expected.sort().values.tolist()


class Images:
    """`ImageInputs` that are never asked."""

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        raise NotImplementedError

    def read(self, prompts: Sequence[Prompt], **arguments: Any) -> tuple[Tensor, list[int]]:
        raise NotImplementedError


class Mixing(NativeMixtureEngine):
    """A mixture with itself: whatever the weight, a model mixed with a copy of itself is that model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.copy = conforming_model()
        super().__init__(model, OtherModel(self.copy), eos_token_ids=[EOS])

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        super().submit([mixing(r, 0.3, r.params.max_tokens) for r in requests])

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        self.copy.load_state_dict(source.module.state_dict())
        return super().update_weights(source, version)


# the others concern single requests, which the specification is compared on
@pytest.mark.parametrize(
    "check",
    [
        check_groups_are_handed_over_whole,
        check_abort_returns_what_was_sampled,
        check_wait_decodes_to_the_end_and_keep_continues,
        check_the_weights_in_force_are_those_of_the_last_update,
        check_weights_in_flight_are_told_apart,
        check_bad_requests_are_refused_and_nothing_is_submitted,
    ],
)
def test_the_mixture_of_a_model_with_itself_conforms(check: Check) -> None:
    engine = Mixing(conforming_model())
    check(engine, conforming_model())
    assert engine.poll() == []
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_update_the_mixture_is_that_of_the_new_weights(kind: Any) -> None:
    policy, other = conforming_model(), OtherModel(moved(conforming_model()))
    engine = kind(policy, other, eos_token_ids=[EOS])
    requests = [request(9, n=3, mixture=0.3)]
    before = generate(engine, requests)
    new = moved(moved(policy))
    assert engine.update_weights(Source(new), 4).bytes > 0
    after = generate(engine, requests)
    assert {span.version for c in after[0] for span in c.versions} == {4}
    check_logprobs(new, other, requests, after, atol=1e-4)
    assert after != before
    # the learner's own module: nothing is copied, and its changes are seen
    with torch.no_grad():
        policy.model.norm.weight.mul_(0.7)
    assert engine.update_weights(Source(policy), 5).bytes == 0
    changed = generate(engine, requests)
    check_logprobs(policy, other, requests, changed, atol=1e-4)
    assert changed[0][0].rollout_logprobs != after[0][0].rollout_logprobs


def with_adapter(model: PreTrainedModel) -> Adapter:
    """An adapter whose B is not 0, as after some updates."""
    adapter = Adapter(model, LoraConfig(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.linspace(-0.2, 0.2, weight.numel()).view_as(weight))
    adapter.merge()
    return adapter


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_model_may_be_the_policy_without_its_adapter(
    kind: Any, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    if is_packed:
        monkeypatch.setattr(cpu_linear, "can_pack", lambda weight: type(weight) is nn.Parameter)
    base, model = tiny("llama"), tiny("llama")
    adapter = with_adapter(model)
    learned = [(name, p.requires_grad) for name, p in model.named_parameters()]
    requests = [request(9, n=3, mixture=0.3), request(4, n=2, mixture=0.0), request(6, n=2, mixture=1.0)]
    other = OtherModel(adapter.base_model)
    expected = generate(HFMixtureEngine(adapter.merged, OtherModel(base), eos_token_ids=[EOS]), requests)
    assert len(set(tokens(expected)[0])) == 3
    # the engine holds the layers with the adapter, or the merged weights, as a run does
    for policy in (model, adapter.merged):
        engine = kind(policy, other, eos_token_ids=[EOS])
        groups = generate(engine, requests)
        assert tokens(groups) == tokens(expected)
        check_logprobs(adapter.merged, OtherModel(base), requests, groups)
        engine.release()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == learned
    assert not any("forward" in vars(module) for m in (model, adapter.merged) for module in m.modules())
    with_it, merged = (logits_of(m, requests[0], expected[0][0]) for m in (model, adapter.merged))
    torch.testing.assert_close(with_it, merged)


def test_a_kv_cache_holds_keys_of_both_models() -> None:
    # bytes of a token: 2 layers x (key, value) x 2 heads x 8 numbers x 4 bytes = 256; 3 layers, 1 head: 192
    room = 448 * (10 + 3 * 20) / 2**30
    policy, other = tiny("llama"), OtherModel(other_tiny())
    engine = NativeMixtureEngine(policy, other, eos_token_ids=[EOS], kv_cache_gib=room)
    requests = [request(10, n=3, max_tokens=20, mixture=0.3), request(9, n=3, max_tokens=20, mixture=0.3)]
    whole = generate(NativeMixtureEngine(policy, other, eos_token_ids=[EOS]), requests)
    assert tokens(generate(engine, requests)) == tokens(whole)
    with pytest.raises(EngineError, match="kv_cache_gib"):
        engine.submit([request(11, n=3, max_tokens=20)])


def test_models_that_cannot_be_mixed_are_refused() -> None:
    policy = tiny("llama")
    larger = OtherModel(tiny("llama", vocab_size=151))
    for name in ("native", "hf"):
        with pytest.raises(EngineError, match="150 logits for 150 token ids, the other model 151"):
            mixture_engine(name, policy, larger, eos_token_ids=[EOS])
    with pytest.raises(EngineError, match="one model; expected native or hf"):
        mixture_engine("vllm", policy, OtherModel(tiny("llama")), eos_token_ids=[EOS])
    with pytest.raises(EngineError, match="the other model has no image inputs"):
        check_mixable(policy, OtherModel(tiny("llama")), Images())
    with pytest.raises(EngineError, match="hf samples no mixtures of models that read images"):
        seeing = OtherModel(tiny("llama"), image_inputs=Images())
        mixture_engine("hf", policy, seeing, eos_token_ids=[EOS], image_inputs=Images())
    sharded = tiny("llama")
    layer = sharded.model.layers[0]
    layer.__class__ = type("Sharded", (FSDPModule, type(layer)), {})
    with pytest.raises(EngineError, match="the other model is sharded over ranks"):
        mixture_engine("native", policy, OtherModel(sharded), eos_token_ids=[EOS])
    meta = nn.Module.to(tiny("llama"), "meta")
    with pytest.raises(EngineError, match="policy is on cpu, the other model on meta"):
        mixture_engine("native", policy, OtherModel(meta), eos_token_ids=[EOS])


@pytest.mark.parametrize("kind", [NativeEngine, HFEngine])
def test_an_engine_of_one_model_refuses_a_mixture(kind: Any) -> None:
    with pytest.raises(EngineError, match="this engine has one model"):
        kind(tiny("llama"), eos_token_ids=[EOS]).submit([request(9, mixture=0.3)])
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        request(9, mixture=1.5)


def test_where_native_cannot_decode_the_other_model_hf_takes_its_place() -> None:
    policy, other = tiny("llama"), OtherModel(tiny("mistral", sliding_window=8))
    with pytest.warns(UserWarning, match="sliding window of 8 tokens; mixtures are sampled by the slower"):
        engine = mixture_engine("native", policy, other, eos_token_ids=[EOS])
    assert isinstance(engine, HFMixtureEngine)
    assert isinstance(
        mixture_engine("native", policy, OtherModel(other_tiny()), eos_token_ids=[EOS]), NativeMixtureEngine
    )
