"""Images hidden from attention: nothing of them reaches an answer, and what is visible stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models.vision.hidden import hidden_from_attention
from rlhf.models.vision.images import noise
from rlhf.rollout.engine import RolloutRequest, SamplingParams
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.learner_module import sampling_mode
from rlhf.types import Completion, Image, Prompt
from tests.vision.support import processor_of, prompt_of, seeing_policy
from tests.vision_models import FAMILIES

PICTURES = [noise(24, 16, seed) for seed in (0, 1)]


def places_of(prompt: Prompt, token: int) -> list[int]:
    return [place for place, each in enumerate(prompt.token_ids) if each == token]


@pytest.fixture(params=FAMILIES)
def seen(
    request: pytest.FixtureRequest, tiny_vlm: Callable[[str], Path]
) -> tuple[Any, list[Prompt], list[int]]:
    """A policy in float64, a prompt with one picture and with another, and where its image tokens are."""
    folder = tiny_vlm(request.param)
    policy = seeing_policy(folder, dtype=torch.float64)
    assert policy.vision is not None
    prompts = [ask(folder, picture) for picture in PICTURES]
    assert prompts[0].token_ids == prompts[1].token_ids
    return policy, prompts, places_of(prompts[0], policy.vision.processor.image_token_id)


def ask(folder: Path, picture: Image) -> Prompt:
    return prompt_of(processor_of(folder), "one", "what is <image> like?", picture)


@torch.no_grad()
def logits(policy: Any, prompt: Prompt, hidden: list[int]) -> Tensor:
    with sampling_mode(policy.model, "sdpa"), hidden_from_attention(policy.model, hidden):
        inputs = policy.vision.inputs(prompt)
        return policy.model(input_ids=torch.tensor([prompt.token_ids]), **inputs).logits[0]


def sampled(policy: Any, prompt: Prompt, hidden: list[int], *, use_cache: bool) -> Completion:
    engine = HFEngine(policy.model, eos_token_ids=(2,), image_inputs=policy.vision)
    engine.use_cache = use_cache
    engine.submit([RolloutRequest(prompt, SamplingParams(n=2, max_tokens=6, seed=3))])
    with hidden_from_attention(policy.model, hidden):
        return engine.poll()[1]


def test_with_all_of_it_hidden_the_picture_changes_nothing(seen: tuple[Any, list[Prompt], list[int]]):
    policy, prompts, places = seen
    plain = [logits(policy, prompt, []) for prompt in prompts]
    blind = [logits(policy, prompt, places) for prompt in prompts]
    # behind the picture; its own tokens still have states of their own, which nothing reads
    behind = slice(places[-1] + 1, None)
    assert (plain[0] - plain[1])[behind].abs().max() > 1e-3
    assert torch.allclose(blind[0][behind], blind[1][behind], rtol=0, atol=1e-12)
    assert (plain[0] - blind[0])[behind].abs().max() > 1e-3


def test_a_hidden_token_alone_changes_nothing_but_what_it_showed(seen: tuple[Any, list[Prompt], list[int]]):
    policy, prompts, places = seen
    plain, some = (logits(policy, prompts[0], hidden) for hidden in ([], places[:1]))
    # what stands before it cannot see it anyway
    assert torch.equal(plain[: places[0]], some[: places[0]])
    assert not torch.equal(plain[-1], some[-1])
    assert torch.equal(plain, logits(policy, prompts[0], []))


def test_what_is_sampled_is_what_a_forward_pass_with_the_same_tokens_hidden_says(
    seen: tuple[Any, list[Prompt], list[int]],
):
    policy, prompts, places = seen
    for hidden in ([], places[::2], places):
        cached, again = (sampled(policy, prompts[0], hidden, use_cache=use) for use in (True, False))
        assert cached.token_ids == again.token_ids
        whole = Prompt("one", (*prompts[0].token_ids, *cached.token_ids), "", images=prompts[0].images)
        rows = logits(policy, whole, hidden)[len(prompts[0].token_ids) - 1 : -1].log_softmax(-1)
        expected = [row[token].item() for row, token in zip(rows, cached.token_ids, strict=True)]
        for completion in (cached, again):
            assert completion.rollout_logprobs == pytest.approx(expected, abs=1e-5)
    # the other picture, all of it hidden: the same words with the same log-probs
    other = sampled(policy, prompts[1], places, use_cache=True)
    assert other.token_ids == cached.token_ids
    assert other.rollout_logprobs == pytest.approx(cached.rollout_logprobs, abs=1e-6)
