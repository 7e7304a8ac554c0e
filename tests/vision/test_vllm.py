"""Pictures through vLLM: the engine sees what the learner sees, and holds the eyes it was sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.rollout import RolloutConfig
from rlhf.models.packing import pack
from rlhf.models.policy import Policy
from rlhf.models.vision.embeddings import Vision
from rlhf.models.vision.images import noise
from rlhf.rollout.engine import EngineError, RolloutRequest, SamplingParams, SyncError, generate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.vllm.worker import HeldWeights
from rlhf.sync.weight_sync import WeightSync
from rlhf.types import Completion, Group, Prompt
from tests.rollout.vllm.support import needs_vllm
from tests.vision.support import HEADS, mixed_prompts, prompt_of, seeing_policy
from tests.vision.test_exactness import logprobs
from tests.vision.test_observed_pictures import conversation, packed_of
from tests.vision_models import FAMILIES, save_tiny_vlm

pytestmark = needs_vllm
TOLERANCE = 2e-4
EOS = 2


# Idefics3 is the class of SmolVLM in vLLM
@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "idefics3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_tiny_vlm(path, request.param, **HEADS)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return seeing_policy(folder)


@pytest.fixture(scope="module")
def engine(policy: Policy) -> Iterator[Any]:
    engine = engine_for(policy)
    engine.update_weights(sync_of(policy), 0)
    yield engine
    engine.close()


def engine_for(policy: Policy, name: str = "vllm") -> Any:
    assert policy.vision is not None
    image_inputs = Vision(policy.model, policy.vision.processor)
    return make_engine(
        name, policy.model, eos_token_ids=[EOS], kv_cache_gib=0.1, max_tokens=256, image_inputs=image_inputs
    )


def sync_of(policy: Policy) -> WeightSync:
    return WeightSync(policy, prompts_of(policy)[0], RolloutConfig(engine="vllm"), tolerance=1e-3)


def prompts_of(policy: Policy) -> list[Prompt]:
    assert policy.vision is not None
    return mixed_prompts(policy.vision.processor)


def requests_for(prompts: Sequence[Prompt]) -> list[RolloutRequest]:
    return [RolloutRequest(p, SamplingParams(n=3, max_tokens=12, seed=i)) for i, p in enumerate(prompts)]


@torch.no_grad()
def worst(policy: Policy, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> float:
    """Largest |log-prob of the engine - log-prob of the learner|."""
    packed = pack(
        [torch.tensor(p.token_ids) for p in prompts],
        [[torch.tensor(c.token_ids) for c in group] for group in groups],
        [p.pictures for p in prompts],
    )
    scored = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
    assert scored is not None
    sampled = [x for group in groups for c in group for x in c.rollout_logprobs or ()]
    return (scored - torch.tensor(sampled)).abs().max().item()


def test_log_probs_are_the_learners_with_no_one_and_two_pictures(engine: Any, policy: Policy) -> None:
    prompts = prompts_of(policy)
    groups = generate(engine, requests_for(prompts))
    assert [len(group) for group in groups] == [3, 3, 3]
    assert worst(policy, prompts, groups) < TOLERANCE
    # they are of these pictures: given the other way round they are others
    turned = replace(prompts[0], images=(prompts[0].images or ())[::-1])
    assert worst(policy, [turned], groups[:1]) > 5 * TOLERANCE


def test_two_pictures_of_one_size_are_told_apart(engine: Any, policy: Policy) -> None:
    assert policy.vision is not None
    prompts = [prompt_of(policy.vision.processor, f"p{i}", "what? <image>", noise(24, 16, i)) for i in (5, 6)]
    assert prompts[0].token_ids == prompts[1].token_ids
    groups = generate(engine, requests_for(prompts))
    assert worst(policy, prompts, groups) < TOLERANCE
    assert worst(policy, prompts[::-1], groups) > 5 * TOLERANCE


def test_a_placeholder_that_is_sampled_is_a_token_like_any_other(engine: Any, policy: Policy) -> None:
    assert policy.vision is not None
    prompt = prompts_of(policy)[2]
    groups = generate(engine, [RolloutRequest(prompt, SamplingParams(n=40, max_tokens=16, seed=0))])
    token = policy.vision.processor.image_token_id
    assert any(token in completion.token_ids[:-1] for completion in groups[0])
    assert worst(policy, [prompt], groups) < TOLERANCE


def test_a_turn_behind_an_observed_picture_has_the_learners_log_probs(engine: Any, policy: Policy) -> None:
    """The turn is sampled behind prompt, first turn and observation; the learner reads them in one row."""
    assert policy.vision is not None
    processor = policy.vision.processor
    # the second time the policy has written a placeholder itself, which is text
    for written in ([], [processor.image_token_id]):
        prompt, said, following = conversation(processor, written)
        [group] = generate(engine, [RolloutRequest(following, SamplingParams(n=3, max_tokens=12, seed=5))])
        whole = [replace(said, token_ids=said.token_ids + c.token_ids) for c in group]
        scored = logprobs(policy, packed_of([Group(prompt, tuple(whole))])).detach()
        turns = torch.split(scored, [len(t.token_ids) for t in whole])
        for both, completion in zip(turns, group, strict=True):
            stated = torch.tensor(completion.rollout_logprobs)
            torch.testing.assert_close(both[len(said.token_ids) :], stated, rtol=0, atol=TOLERANCE)
        # they are of the observed picture: behind another one they are others
        [observed] = said.observations
        another = replace(observed, images=replace(observed.images, sources=(noise(32, 24, 9),)))
        changed = [replace(t, observations=(another,)) for t in whole]
        others = logprobs(policy, packed_of([Group(prompt, tuple(changed))]))
        assert (others - scored).abs().max() > 5 * TOLERANCE


def test_an_update_reaches_the_eyes(engine: Any, policy: Policy) -> None:
    """Features of pictures seen before are computed anew, and every weight is read back."""
    prompts = prompts_of(policy)
    generate(engine, requests_for(prompts))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "vis" in name:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    report = engine.update_weights(sync_of(policy), 1)
    assert report.compared >= len(before) and report.unread == ()
    groups = generate(engine, requests_for(prompts))
    assert worst(policy, prompts, groups) < TOLERANCE
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(before[name])
    assert worst(policy, prompts, groups) > 5 * TOLERANCE
    engine.update_weights(sync_of(policy), 2)


def test_a_weight_of_the_eyes_that_is_left_behind_is_named(
    engine: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(n for n, p in policy.model.named_parameters() if "vis" in n and p.ndim == 2)
    load = HeldWeights.tandem_load

    def without(self: Any, weights: Any = None, path: str | None = None) -> Any:
        return load(self, ((n, w) for n, w in weights if n != name), path)

    with monkeypatch.context() as patched, torch.no_grad():
        policy.model.get_parameter(name).add_(1e-6)
        patched.setattr(HeldWeights, "tandem_load", without)
        with pytest.raises(SyncError, match=f"does not hold {name} "):
            engine.update_weights(sync_of(policy), 3)
        policy.model.get_parameter(name).sub_(1e-6)
    engine.update_weights(sync_of(policy), 4)


def test_placeholders_that_are_not_the_pictures_are_refused_with_the_sample(
    engine: Any, policy: Policy
) -> None:
    assert policy.vision is not None
    token, prompt = policy.vision.processor.image_token_id, prompts_of(policy)[2]
    first, count = prompt.token_ids.index(token), prompt.token_ids.count(token)
    fewer = prompt.token_ids[:first] + prompt.token_ids[first + 1 :]
    apart = (*prompt.token_ids[: first + 1], 5, *prompt.token_ids[first + 1 :])
    for ids, told in (
        (fewer, f"^one: .* {count - 1} placeholders, its images make {count} f"),
        (apart, "^one: .* together"),
    ):
        with pytest.raises(EngineError, match=told):
            engine.submit(requests_for([replace(prompt, token_ids=ids)]))
    assert engine.poll() == []
