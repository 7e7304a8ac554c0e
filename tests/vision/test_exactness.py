"""A packed batch with pictures trains as its sequences do, each alone through the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.models.vision.images import ImageError, noise
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.factory import make_engine, mixture_engine
from rlhf.rollout.mixture import OtherModel
from rlhf.types import Group, Prompt
from tests.support import learner_of, policy_of, trajectory
from tests.vision.support import OTHER, mixed_prompts, seeing_policy
from tests.vision_models import FAMILIES

Folder = Callable[[str], Path]
Gradients = dict[str, Tensor]


def completions(policy: Policy) -> list[list[Tensor]]:
    """One of them has a placeholder, written by the policy itself: a token like any other."""
    assert policy.vision is not None
    mark = policy.vision.processor.image_token_id
    ids = [[[5, 6, mark, 9], [8]], [[9, 10]], [[4, 5], [7, 8, 9], [mark]]]
    return [[torch.tensor(completion) for completion in group] for group in ids]


def packed_of(prompts: list[Prompt], groups: list[list[Tensor]]) -> Packed:
    return pack([torch.tensor(p.token_ids) for p in prompts], groups, [p.pictures for p in prompts])


def logprobs(policy: Policy, packed: Packed) -> Tensor:
    result = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert result is not None
    return result


def own_logprobs(policy: Policy, prompt: Prompt, completion: Tensor) -> Tensor:
    """By the model's own forward over ids and pixels, one sequence."""
    assert policy.vision is not None
    inputs = policy.vision.inputs(prompt) if prompt.images else {}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(completion)))
    ids = torch.cat([torch.tensor(prompt.token_ids), completion])
    logits = policy.model(input_ids=ids[None], **inputs).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]


def gradients(policy: Policy, value: Tensor) -> Gradients:
    policy.model.zero_grad()
    (value * torch.linspace(-1, 1, len(value), dtype=value.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_same(got: Gradients, want: Gradients) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pictures_train_as_single_sequences_do(tiny_vlm: Folder, family: str) -> None:
    policy = seeing_policy(tiny_vlm(family), dtype=torch.float64)
    assert policy.vision is not None
    prompts = mixed_prompts(policy.vision.processor)
    mark = policy.vision.processor.image_token_id
    groups = [[c for c in group if mark not in c] for group in completions(policy)]
    assert policy.layout == "shared_prefix"
    got = logprobs(policy, packed_of(prompts, groups))
    packed_gradients = gradients(policy, got)
    policy.layout = "padded"
    want = torch.cat([own_logprobs(policy, p, c) for p, g in zip(prompts, groups, strict=True) for c in g])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    own_gradients = gradients(policy, want)
    assert any(name.startswith("model.vis") for name in own_gradients), "the eyes learn too"
    assert_same(packed_gradients, own_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_same_also_where_the_policy_wrote_a_placeholder(
    tiny_vlm: Folder, family: str
) -> None:
    policy = seeing_policy(tiny_vlm(family), dtype=torch.float64)
    assert policy.vision is not None
    packed = packed_of(mixed_prompts(policy.vision.processor), completions(policy))
    want = logprobs(policy, packed)
    expected = gradients(policy, want)
    for layout in ("packed", "padded"):
        policy.layout = layout
        got = logprobs(policy, packed)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert_same(gradients(policy, got), expected)


def test_what_the_policy_says_depends_on_the_picture(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_5_vl"))
    assert policy.vision is not None
    prompts = mixed_prompts(policy.vision.processor)
    groups = completions(policy)
    seen = logprobs(policy, packed_of(prompts, groups))
    assert prompts[0].images is not None
    swapped = replace(prompts[0], images=(prompts[0].images[0], OTHER))
    with pytest.raises(ImageError, match=r"two: it has 14 placeholders, its images make 18 feat"):
        logprobs(policy, packed_of([swapped, *prompts[1:]], groups))
    another = replace(prompts[2], images=(noise(32, 24, 9),))
    difference = (seen - logprobs(policy, packed_of([*prompts[:2], another], groups))).abs()
    last = sum(len(c) for c in groups[2])
    assert difference[-last:].max() > 1e-3
    assert difference[:-last].max() < 1e-6


def test_pictures_are_never_left_out_in_silence(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"))
    assert policy.vision is not None
    packed = packed_of(mixed_prompts(policy.vision.processor), completions(policy))
    with pytest.raises(ModelError, match="was loaded without an image processor"):
        logprobs(policy_of(tiny_vlm("qwen2_vl")), packed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["native", "hf"])
def test_an_engine_samples_from_what_the_learner_computes(tiny_vlm: Folder, family: str, name: str) -> None:
    policy = seeing_policy(tiny_vlm(family))
    assert policy.vision is not None
    engine = make_engine(name, policy.model, eos_token_ids=[2], image_inputs=policy.vision)
    prompts = mixed_prompts(policy.vision.processor)
    requests = [RolloutRequest(p, SamplingParams(n=3, max_tokens=9, seed=i)) for i, p in enumerate(prompts)]
    sampled = generate(engine, requests)
    tokens = [[torch.tensor(c.token_ids) for c in group] for group in sampled]
    rollout = torch.tensor([p for group in sampled for c in group for p in c.rollout_logprobs or ()])
    torch.testing.assert_close(logprobs(policy, packed_of(prompts, tokens)), rollout, rtol=0, atol=1e-5)
    assert policy.layout == "shared_prefix", "the learner finds its attention as it left it"


def test_a_mixture_reads_pictures_with_both_models(tiny_vlm: Folder) -> None:
    policy, other = seeing_policy(tiny_vlm("qwen2_vl")), seeing_policy(tiny_vlm("qwen2_vl"))
    assert policy.vision is not None
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.mul_(1.1)
    beside = OtherModel(other.model, image_inputs=other.vision)
    engine = mixture_engine("native", policy.model, beside, eos_token_ids=[2], image_inputs=policy.vision)
    prompts = mixed_prompts(policy.vision.processor)
    params = [SamplingParams(n=2, max_tokens=6, seed=i) for i in range(len(prompts))]
    requests = [RolloutRequest(prompt, p, mixture=0.4) for prompt, p in zip(prompts, params, strict=True)]
    sampled = generate(engine, requests)
    packed = packed_of(prompts, [[torch.tensor(c.token_ids) for c in group] for group in sampled])
    own, others = (model.logits(packed).log_softmax(-1) for model in (policy, other))
    expected = (0.6 * own + 0.4 * others).log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    rollout = torch.tensor([p for group in sampled for c in group for p in c.rollout_logprobs or ()])
    torch.testing.assert_close(expected, rollout, rtol=0, atol=1e-5)
    assert not torch.allclose(own, others, atol=0.01)


@pytest.mark.parametrize("microbatch_tokens", [60, 4096])
def test_cutting_a_batch_with_pictures_changes_nothing(tiny_vlm: Folder, microbatch_tokens: int) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"), dtype=torch.float64)
    assert policy.vision is not None
    prompts = mixed_prompts(policy.vision.processor)
    samples = [[c.tolist() for c in group] + [[9, 3]] for group in completions(policy)]
    groups = [
        Group(p, tuple(trajectory(ids, float(i % 2)) for i, ids in enumerate(group)))
        for p, group in zip(prompts, samples, strict=True)
    ]
    algorithm = ALGORITHMS["grpo"](kl=KL(coef=0.0))
    learner, builder = learner_of(policy, algorithm, microbatch_tokens=microbatch_tokens)
    experience = builder.build(groups, kl_coef=0.0)
    assert [i and i.prompt_id for i in experience.images] == ["two", None, "one"]
    counts = learner.counts(experience, [0, 1, 2])
    policy.model.zero_grad()
    learner.accumulate(experience, [0, 1, 2], counts, 0.0)
    got = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    whole, _ = learner_of(policy, algorithm, microbatch_tokens=100_000)
    policy.layout = "padded"
    policy.model.zero_grad()
    whole.accumulate(experience, [0, 1, 2], counts, 0.0)
    want = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    assert max(g.abs().max() for g in want.values()) > 1e-6
    assert_same(got, want)
