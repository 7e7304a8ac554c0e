"""Episodes in which the environment shows pictures: every turn is sampled as the model itself reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf.collect.episodes import Episodes
from rlhf.environments.conversation import Conversation
from rlhf.environments.protocol import Message, Reply
from rlhf.models.vision.embeddings import Vision
from rlhf.rollout.engine import RolloutRequest, SamplingParams
from rlhf.rollout.episode import Episode, trajectory_of
from rlhf.rollout.factory import make_engine
from rlhf.types import Completion, Images, Prompt
from tests.environments.scripted import Scripted
from tests.vision.support import HIGH, OTHER, WIDE, prompt_of, seeing_policy
from tests.vision_models import FAMILIES

STOPS = tuple(range(20, 45))


def shows(key: str, messages: Sequence[Message]) -> Reply:
    parts = [{"type": "text", "text": "look <image>"}, {"type": "image", "image": OTHER}]
    return Reply(({"role": "tool", "name": "crop", "content": parts},), calls=1)


def begins(key: str, columns: Mapping[str, Any], seed: int) -> Reply:
    parts = [{"type": "image", "image": HIGH}, {"type": "text", "text": "and this"}]
    return Reply(({"role": "user", "content": parts},))


def sample(
    folder: Path, engine: str, *, with_prompt: bool
) -> tuple[list[Episode], Any, Callable[[list[int], Images], dict[str, Any]]]:
    policy = seeing_policy(folder)
    vision = policy.vision
    assert isinstance(vision, Vision)
    processor = vision.processor
    conversation = Conversation(processor.tokenizer, frozenset([2]), processor)
    sampler = make_engine(
        engine, policy.model, eos_token_ids=(2,), kv_cache_gib=0.1, max_tokens=400, image_inputs=vision
    )
    environments = Scripted(shows, begins=begins) if with_prompt else Scripted(shows)
    run = Episodes(sampler, environments, conversation, processor.tokenizer, 3, 200)
    prompts: list[Prompt] = [
        prompt_of(processor, "one", "what? <image>", WIDE),
        prompt_of(processor, "none", "say it"),
    ]
    asked = [
        RolloutRequest(p, SamplingParams(2, 150, seed=i, stop_token_ids=STOPS)) for i, p in enumerate(prompts)
    ]
    groups = run.run(asked, [0, 0])

    def inputs(ids: list[int], images: Images) -> dict[str, Any]:
        return {"input_ids": torch.tensor([ids]), **processor.inputs(images, ids)}

    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    return [e for group in groups for e in group], model, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_sampled_as_the_model_reads_it(tiny_vlm: Callable[[str], Path], family: str) -> None:
    engine = "hf" if family == "smolvlm" else "native"
    episodes, model, inputs = sample(tiny_vlm(family), engine, with_prompt=family == "qwen2_5_vl")
    for episode in episodes:
        assert episode.lost is None, episode.lost
        found = trajectory_of(episode, text="", reward=0.0, objectives={})
        assert [len(o.images.sources) for o in found.observations] == [1, 1]
        sources = (*(episode.prompt.images or ()), *(s for o in found.observations for s in o.images.sources))
        ids = [*episode.prompt.token_ids, *found.token_ids]
        start = len(episode.prompt.token_ids)
        mark = model.config.image_token_id
        spans = [(0, start), *((start + o.start, start + o.end) for o in found.observations)]
        places = tuple(i for a, b in spans for i in range(a, b) if ids[i] == mark)
        with torch.no_grad():
            logits = model(**inputs(ids, Images("episode", sources, places=places))).logits[0]
        logprobs = logits.log_softmax(-1)
        assert found.rollout_logprobs is not None
        for place, own in enumerate(found.loss_mask):
            if own:
                expected = float(logprobs[start + place - 1, ids[start + place]])
                assert found.rollout_logprobs[place] == pytest.approx(expected, abs=2e-4)
        # pictures are no part of what is written down
        assert all(
            part == {"type": "image"} or part["type"] == "text"
            for message in episode.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        )
        assert sum(isinstance(turn, Completion) for turn in episode.turns) == 3
