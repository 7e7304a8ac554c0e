"""Pictures in what an environment answers: read as the model itself reads them, in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.learn.buffer import Buffer
from rlhf.metrics import merge
from rlhf.models.loading import LAYOUTS
from rlhf.models.packing import Layout, Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.models.vision.images import ImageError
from rlhf.models.vision.processor import Processor
from rlhf.rollout.engine import EngineError, RolloutRequest, SamplingParams, generate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.vllm.images import ImageFormat, _placeholder_ranges
from rlhf.types import Group, Image, Images, Observed, Prompt, Trajectory
from tests.support import learner_of, policy_of, trajectory, unscored
from tests.vision.support import HIGH, OTHER, WIDE, mixed_prompts, seeing_policy
from tests.vision.test_exactness import assert_same, gradients, logprobs
from tests.vision_models import FAMILIES

Folder = Callable[[str], Path]


def seen(processor: Processor, *images: Image) -> list[int]:
    """Tokens of an observation that shows these pictures."""
    place = processor.placeholder
    if processor.has_axes:
        place = f"<|vision_start|>{place}<|vision_end|>"
    return processor.token_ids(f"now {place * len(images)}.", Images("observation", images))


def episode(processor: Processor, *turns: list[int] | tuple[Image, ...], reward: float = 1.0) -> Trajectory:
    """Lists are tokens of the policy, tuples the pictures of an observation."""
    ids, mask, numbers, observations = list[int](), list[bool](), list[int](), list[Observed]()
    for turn in turns:
        tokens = turn if isinstance(turn, list) else seen(processor, *turn)
        numbers += [len(observations)] * len(tokens)
        if isinstance(turn, tuple):
            images = Images(f"episode at {len(ids)}", turn)
            observations.append(Observed(len(ids), len(ids) + len(tokens), images))
        mask += [isinstance(turn, list)] * len(tokens)
        ids += tokens
    observed = {"loss_mask": tuple(mask), "turns": tuple(numbers), "observations": tuple(observations)}
    return trajectory(ids, reward, **observed)


def groups_of(processor: Processor, written: list[int]) -> list[Group]:
    """Prompts of two pictures, none and one; the policy writes the tokens `written` in some of its turns."""
    two, none, one = mixed_prompts(processor)
    several = [
        episode(processor, [5, *written, 6], (OTHER,), [7, 8]),
        episode(processor, [9], reward=0.0),
        episode(processor, [4, 5], (HIGH, WIDE), [6, *written], (OTHER,), [5, 4]),
    ]
    alone = [episode(processor, [8, *written], (WIDE,), [9]), episode(processor, [7, 7], reward=0.0)]
    last = [episode(processor, [6], reward=0.0), episode(processor, [4], (OTHER,), [3, *written, 9])]
    return [Group(p, tuple(ts)) for p, ts in ((two, several), (none, alone), (one, last))]


def packed_of(groups: list[Group]) -> Packed:
    return pack(
        [torch.tensor(g.prompt.token_ids) for g in groups],
        [[torch.tensor(t.token_ids) for t in g.trajectories] for g in groups],
        [g.prompt.pictures for g in groups],
        [t.observations for g in groups for t in g.trajectories],
    )


def own_logprobs(policy: Policy, prompt: Prompt, t: Trajectory) -> Tensor:
    """By the model's own forward over the ids of one sequence and all its pictures."""
    assert policy.vision is not None
    images = (*(prompt.images or ()), *(source for o in t.observations for source in o.images.sources))
    ids = prompt.token_ids + t.token_ids
    inputs = policy.vision.inputs(Prompt("all", ids, "", images=images)) if images else {}
    logits = policy.model(input_ids=torch.tensor([ids]), **inputs).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(t.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_episodes_with_pictures_train_as_the_models_own_forward_does_in_every_layout(
    tiny_vlm: Folder, family: str
) -> None:
    policy = seeing_policy(tiny_vlm(family), dtype=torch.float64)
    assert policy.vision is not None
    groups = groups_of(policy.vision.processor, [])
    got = logprobs(policy, packed_of(groups))
    found = gradients(policy, got)
    policy.layout = "padded"
    want = torch.cat([own_logprobs(policy, g.prompt, t) for g in groups for t in g.trajectories])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert_same(found, gradients(policy, want))
    # what the policy writes is text, also a placeholder, which the model's own forward cannot tell
    mark = policy.vision.processor.image_token_id
    packed = packed_of(groups_of(policy.vision.processor, [mark]))
    policy.layout = "shared_prefix"
    want = logprobs(policy, packed)
    expected = gradients(policy, want)
    for layout in ("packed", "padded"):
        policy.layout = layout
        got = logprobs(policy, packed)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert_same(gradients(policy, got), expected)


def conversation(processor: Processor, written: list[int]) -> tuple[Prompt, Trajectory, Prompt]:
    """A prompt, what was said behind it, and both as the prompt of the next turn."""
    [prompt, _, _] = mixed_prompts(processor)
    said = episode(processor, [5, *written], (OTHER,))
    ids = prompt.token_ids + said.token_ids
    marks = [i for i, token in enumerate(ids) if token == processor.image_token_id]
    own = range(len(prompt.token_ids) + 1, len(prompt.token_ids) + 1 + len(written))
    places = tuple(i for i in marks if i not in own)
    assert prompt.images is not None and len(marks) - len(places) == len(written)
    following = replace(prompt, id="next", token_ids=ids, images=(*prompt.images, OTHER), image_places=places)
    return prompt, said, following


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_turn_is_sampled_from_what_the_learner_computes(tiny_vlm: Folder, family: str) -> None:
    policy = seeing_policy(tiny_vlm(family))
    assert policy.vision is not None
    processor = policy.vision.processor
    native = make_engine("native", policy.model, eos_token_ids=[2], image_inputs=policy.vision)
    hf = make_engine("hf", policy.model, eos_token_ids=[2], image_inputs=policy.vision)
    params = SamplingParams(n=2, max_tokens=5, seed=3)
    for engine, written in ((native, [processor.image_token_id]), (hf, [])):
        prompt, said, following = conversation(processor, written)
        [sampled] = generate(engine, [RolloutRequest(following, params)])
        whole = [replace(said, token_ids=said.token_ids + c.token_ids) for c in sampled]
        got = logprobs(policy, packed_of([Group(prompt, tuple(whole))]))
        ends = torch.split(got, [len(t.token_ids) for t in whole])
        for logprob, completion in zip(ends, sampled, strict=True):
            stated = torch.tensor(completion.rollout_logprobs)
            torch.testing.assert_close(logprob[len(said.token_ids) :], stated, rtol=0, atol=1e-5)
    _, _, following = conversation(processor, [processor.image_token_id])
    with pytest.raises(EngineError, match="the policy wrote a placeholder of an image itself"):
        hf.submit([RolloutRequest(following, params)])


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_microbatches_of_episodes_with_pictures_change_nothing(tiny_vlm: Folder, family: str) -> None:
    policy = seeing_policy(tiny_vlm(family), dtype=torch.float64)
    assert policy.vision is not None
    groups = groups_of(policy.vision.processor, [policy.vision.processor.image_token_id])
    results: list[tuple[float, dict[str, Tensor]]] = []
    cuts: list[tuple[Layout, int]] = [("shared_prefix", 100_000), *((layout, 90) for layout in LAYOUTS)]
    for layout, budget in cuts:
        learner, builder = learner_of(policy, ALGORITHMS["grpo"](kl=KL(coef=0.0)), microbatch_tokens=budget)
        experience = builder.build(groups, kl_coef=0.0)
        policy.layout = layout
        policy.model.zero_grad()
        counts = learner.counts(experience, [0, 1, 2])
        parts = learner.accumulate(experience, [0, 1, 2], counts, 0.0)
        assert (len(parts) > 1) == (budget < 1000)
        grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
        results.append((merge(parts)["loss/policy"].value, grads))
    loss, expected = results[0]
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-6
    for other, got in results[1:]:
        assert other == pytest.approx(loss, abs=1e-10)
        assert_same(got, expected)


def test_an_episode_with_pictures_is_saved_and_comes_back(tiny_vlm: Folder) -> None:
    processor = seeing_policy(tiny_vlm("qwen2_vl")).vision
    assert processor is not None
    groups = groups_of(processor.processor, [])
    first = groups[0].trajectories[0]
    path = replace(first.observations[0], images=Images("ä", ("/a/b.png", OTHER)))
    groups[0] = replace(
        groups[0], trajectories=(replace(first, observations=(path,)), *groups[0].trajectories[1:])
    )
    for group in groups:
        state = json.loads(json.dumps(group_state(group)))
        assert group_of(state, {group.prompt.id: group.prompt}) == group
    experience = unscored(groups)
    assert [len(o) for o in experience.observed] == [1, 0, 2, 1, 0, 0, 1]
    buffer, other = Buffer(), Buffer()
    buffer.fill(experience, {})
    other.load(buffer.state(), buffer.tensors())
    assert other.experience is not None and other.experience.observed == experience.observed


def test_pictures_of_observations_are_never_left_out_in_silence(tiny_vlm: Folder) -> None:
    policy = seeing_policy(tiny_vlm("qwen2_vl"))
    assert policy.vision is not None
    [_, text, _] = groups = groups_of(policy.vision.processor, [])
    with pytest.raises(ModelError, match="was loaded without an image processor"):
        logprobs(policy_of(tiny_vlm("qwen2_vl")), packed_of([text]))
    [first, *_] = groups[0].trajectories
    [observed] = first.observations
    swapped = replace(observed, images=replace(observed.images, sources=(WIDE,)))
    with pytest.raises(ImageError, match=r"episode at 2: it has 12 placeholders, its images make 6 features"):
        logprobs(policy, packed_of([Group(groups[0].prompt, (replace(first, observations=(swapped,)),))]))


def test_vllm_is_told_the_places_of_placeholders_that_are_images(tiny_vlm: Folder) -> None:
    vision = seeing_policy(tiny_vlm("qwen2_vl")).vision
    assert vision is not None
    mark = vision.processor.image_token_id
    _, _, following = conversation(vision.processor, [mark])
    layout = ImageFormat("qwen2_vl", mark, torch.float32, vision, merge=4)
    counts = [6, 8, 12]
    ranges = _placeholder_ranges(layout, following, counts)
    assert [length for _, length in ranges] == counts
    assert [i for start, n in ranges for i in range(start, start + n)] == list(following.image_places or ())
    with pytest.raises(EngineError, match="has 27 placeholders, its images make 26 features"):
        _placeholder_ranges(layout, replace(following, image_places=None), counts)
