"""Requests that continue samples of earlier ones, in the native engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from rlhf.rollout.engine import RolloutRequest, generate
from rlhf.rollout.native.engine import NativeEngine
from rlhf.types import Completion, Prompt
from tests.rollout.models import request, tiny
from tests.rollout.native.test_engine import Source, drain

OBSERVED = (70, 71, 72)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def engine(llama: PreTrainedModel) -> NativeEngine:
    return NativeEngine(llama, eos_token_ids=[])


@pytest.fixture
def computed(llama: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of each forward pass."""
    sizes: list[int] = []

    def count(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].numel())

    handle = llama.register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    handle.remove()


def first(n: int = 3, max_tokens: int = 4) -> RolloutRequest:
    return replace(request(9, "first", n=n, max_tokens=max_tokens), keeps=True)


def second(turn: Completion, max_tokens: int = 6) -> RolloutRequest:
    """The next turn of a sample of `first`."""
    ids = (*first().prompt.token_ids, *turn.token_ids, *OBSERVED)
    asked = request(1, n=1, max_tokens=max_tokens, seed=turn.index)
    prompt = Prompt(f"second-{turn.index}", ids, "")
    return replace(asked, prompt=prompt, continues=(turn.prompt_id, turn.index))


def alone(model: PreTrainedModel, asked: Sequence[RolloutRequest]) -> list[tuple[int, ...]]:
    """What the requests sample when all before them is computed again."""
    fresh = NativeEngine(model, eos_token_ids=[])
    return [generate(fresh, [one])[0][0].token_ids for one in asked]


def test_later_turns_join_the_rows_that_are_decoded(
    llama: PreTrainedModel, engine: NativeEngine, computed: list[int]
) -> None:
    expected = generate(engine, [request(5, n=2, max_tokens=30)])[0]
    engine.submit([request(5, n=2, max_tokens=30), first(max_tokens=8)])
    turns = [turn for turn in engine.poll() if turn.prompt_id == "first"]
    computed.clear()
    # one of the three samples is not continued
    asked = [second(turns[0]), second(turns[2], max_tokens=3)]
    engine.submit(asked)
    engine.poll(timeout=0.0)
    engine.poll(timeout=0.0)
    # 2 rows of the other prompt; each turn brings its last token and what was observed, then a token a step
    assert computed == [2 + 2 * (1 + 3), 4]
    later = drain(engine)
    assert {c.prompt_id: c.token_ids for c in later if c.prompt_id != "prompt-5"} == dict(
        zip((one.prompt.id for one in asked), alone(llama, asked), strict=True)
    )
    others = sorted((c for c in later if c.prompt_id == "prompt-5"), key=lambda c: c.index)
    assert [c.token_ids for c in others] == [c.token_ids for c in expected]
    engine.forget(("first", 1))
    assert not engine._cohorts


def test_a_turn_for_which_its_cohort_has_no_place_is_computed_anew(
    llama: PreTrainedModel, engine: NativeEngine, computed: list[int]
) -> None:
    (turn,) = generate(engine, [first(n=1, max_tokens=12)])[0]
    computed.clear()
    # of 12 places 11 are taken: the last token of a turn is not computed
    asked = second(turn, max_tokens=1)
    assert [c.token_ids for c in generate(engine, [asked])[0]] == alone(llama, [asked])
    assert computed[0] == len(asked.prompt.token_ids) and not engine._cohorts


def test_what_is_kept_makes_room_when_nothing_else_is_decoded(llama: PreTrainedModel) -> None:
    # 256 bytes a token (test_engine.py); 120 tokens fit: 9 + 3 x 30 of the first group
    engine = NativeEngine(llama, eos_token_ids=[], kv_cache_gib=120 * 256 / 2**30)
    params = replace(first().params, max_tokens=30, stop_token_ids=(7, 9))
    asked = replace(first(), params=params)
    engine.submit([asked, request(20, n=2, max_tokens=10)])
    turns = [turn for turn in drain(engine) if turn.prompt_id == "first"]
    assert len(turns) == 3 and not engine._cohorts
    later = [second(turn) for turn in turns]
    assert [group[0].token_ids for group in generate(engine, later)] == alone(llama, later)


def test_nothing_is_continued_with_other_weights_or_under_an_id_that_came_again(
    llama: PreTrainedModel, engine: NativeEngine
) -> None:
    turns = generate(engine, [first()])[0]
    engine.update_weights(Source(llama), 1)
    assert not engine._cohorts
    turns = generate(engine, [first()])[0]
    # the same id for other samples
    other = replace(first(), params=replace(first().params, seed=1))
    engine.submit([other])
    assert not engine._cohorts
    assert {c.token_ids for c in drain(engine)} != {c.token_ids for c in turns}


def test_an_abort_ends_a_turn_that_has_joined(engine: NativeEngine) -> None:
    engine.submit([request(5, n=1, max_tokens=30), first()])
    turns = [turn for turn in engine.poll() if turn.prompt_id == "first"]
    engine.submit([second(turns[1])])
    engine.poll(timeout=0.0)
    engine.pause("abort")
    # the other has a token of the prefill, 3 of steps beside `first`, and one of that which the turn joined
    assert {c.prompt_id: len(c.token_ids) for c in engine.poll()} == {"prompt-5": 5, "second-1": 1}
    assert not engine._cohorts
