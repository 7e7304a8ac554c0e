"""`PrefixedEngine`: completions begin with given tokens, also where an environment answers the turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.collect.episodes import Episodes
from rlhf.environments.conversation import Conversation
from rlhf.environments.protocol import Message, Reply
from rlhf.rollout.engine import KeepsSamples, RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.rollout.episode import Observation
from rlhf.rollout.factory import make_engine
from rlhf.rollout.prefixed import PrefixedEngine
from rlhf.types import Completion, FinishReason, Prompt
from tests.environments.scripted import Scripted, results

EOS = 2
PROMPT, PATH = (5, 6, 7), (8, 9, 10)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def plain(model: Any) -> RolloutEngine:
    return make_engine("native", model, eos_token_ids=(EOS,), kv_cache_gib=0.1, max_tokens=200)


@pytest.fixture
def engine(plain: RolloutEngine) -> PrefixedEngine:
    return PrefixedEngine(plain, [EOS])


def request(name: str, tokens: tuple[int, ...] = PROMPT, max_tokens: int = 8) -> RolloutRequest:
    return RolloutRequest(Prompt(name, tokens, "hi"), SamplingParams(2, max_tokens, seed=3))


def test_what_is_sampled_is_what_the_longer_prompt_gives(
    plain: RolloutEngine, engine: PrefixedEngine
) -> None:
    engine.prefixes["a"] = PATH
    with_prefix, without = generate(engine, [request("a"), request("b")])
    [longer] = generate(plain, [request("a", PROMPT + PATH, max_tokens=5)])
    assert [c.token_ids for c in with_prefix] == [PATH + c.token_ids for c in longer]
    assert [c.rollout_logprobs for c in with_prefix] == [None, None]
    assert [c.finish_reason for c in with_prefix] == [c.finish_reason for c in longer]
    # a request without a prefix is sampled as it is
    [same] = generate(plain, [request("b")])
    assert [c.token_ids for c in without] == [c.token_ids for c in same]
    assert all(c.rollout_logprobs is not None for c in without)
    # nothing is left of them
    assert engine.prefixes == {}


def test_a_prefix_that_has_ended_or_fills_the_limit_is_the_completion(engine: PrefixedEngine) -> None:
    engine.prefixes |= {"ended": (8, EOS), "full": PATH}
    ended, full = generate(engine, [request("ended"), request("full", max_tokens=3)])
    assert [(c.token_ids, c.index, c.finish_reason) for c in ended] == [
        ((8, EOS), 0, FinishReason.STOP),
        ((8, EOS), 1, FinishReason.STOP),
    ]
    assert {(c.token_ids, c.finish_reason) for c in full} == {(PATH, FinishReason.LENGTH)}


def test_an_environment_gets_the_whole_turn(engine: PrefixedEngine, model: Any, tiny_model_dir: Path) -> None:
    words: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    heard: list[str] = []

    def answer(key: str, messages: Sequence[Message]) -> Reply:
        if len(messages) > 1:
            return Reply()
        heard.append(messages[0]["content"])
        return results("17")

    assert isinstance(engine, KeepsSamples)
    conversation = Conversation(words, frozenset([EOS]))
    episodes = Episodes(engine, Scripted(answer), conversation, words, max_turns=2, max_prompt_tokens=64)
    content = [{"role": "user", "content": "5 + 12?"}]
    prompt = Prompt("p", conversation.prompt(content, None), content)
    path = tuple(words("add(5, 12)")["input_ids"])
    engine.prefixes["p"] = path
    # of 99 tokens so many end a turn, so that the turns of a random model are short
    params = SamplingParams(2, 200, seed=0, stop_token_ids=tuple(range(20, 60)))
    [group] = episodes.run([RolloutRequest(prompt, params)], [0])
    assert len(heard) == 2
    assert all(text.startswith("add(5, 12)") for text in heard)
    for episode in group:
        first, observed, second = episode.turns
        assert isinstance(first, Completion) and isinstance(observed, Observation)
        assert first.token_ids[: len(path)] == path
        # the second turn is sampled behind all of it: its log-probs are those of a forward over everything
        assert isinstance(second, Completion) and second.rollout_logprobs is not None
        before = [*episode.prompt.token_ids, *first.token_ids, *observed.token_ids]
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *second.token_ids]])).logits[0]
        logprobs = logits.log_softmax(-1)[len(before) - 1 : -1]
        for row, (token, given) in enumerate(zip(second.token_ids, second.rollout_logprobs, strict=True)):
            assert given == pytest.approx(float(logprobs[row, token]), abs=1e-4)
