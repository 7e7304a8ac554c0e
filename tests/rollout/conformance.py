"""What every rollout engine does, whatever it is made of: `CHECKS`, each a function of an engine and its
model.

The engine holds the weights of `model` (version 0), nothing is in flight, and it is left so. A check that
changes weights gives them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.rollout.native.model_support import logprob_errors
from rlhf.rollout.sampling import truncate
from rlhf.types import Completion, FinishReason, Prompt
from tests.rollout.models import EOS, prompt, ragged, request, tiny, untruncated

Check = Callable[[RolloutEngine, PreTrainedModel], None]
CHECKS: list[Check] = []
TOLERANCE = 2e-4
"""Largest allowed difference of float32 log-probs, in nats."""
STOPS = (7, 9, 30, 31, 32)


def conforming_model() -> PreTrainedModel:
    """A small model that every engine can sample from: heads of size 32, tied embedding, float32."""
    return tiny("llama", head_dim=32, hidden_size=64, tie_word_embeddings=True)


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


class Source:
    """A `WeightSource` of a plain module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters()


def drain(engine: RolloutEngine) -> list[Completion]:
    completions: list[Completion] = []
    while polled := engine.poll():
        completions.extend(polled)
    return completions


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def moved(model: PreTrainedModel, by: float = 0.05) -> PreTrainedModel:
    """A copy of the model with every weight changed a little."""
    other = conforming_model()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for old, new in zip(model.parameters(), other.parameters(), strict=True):
            new.copy_(old + by * old.std() * torch.randn_like(old))
    return other


def worst(model: PreTrainedModel, requests: list[RolloutRequest], groups: list[list[Completion]]) -> float:
    return max(logprob_errors(model, requests, groups))


@check
def check_logprobs_are_those_of_a_forward_over_the_whole_sequence(
    engine: RolloutEngine, model: PreTrainedModel
) -> None:
    requests = untruncated(ragged())
    groups = generate(engine, requests)
    assert worst(model, requests, groups) < TOLERANCE
    assert [len(group) for group in groups] == [r.params.n for r in requests]
    assert [c.index for c in groups[0]] == list(range(3))


@check
def check_later_turns_continue_the_tokens_of_earlier_ones(
    engine: RolloutEngine, model: PreTrainedModel
) -> None:
    first = replace(request(11, n=2, max_tokens=9), keeps=True)
    other = request(5, n=2, max_tokens=60)
    engine.submit([first, other])
    came: list[Completion] = []
    while sum(c.prompt_id == first.prompt.id for c in came) < 2:
        came += engine.poll()
    samples = sorted((c for c in came if c.prompt_id == first.prompt.id), key=lambda c: c.index)
    second: list[RolloutRequest] = []
    for sample in samples:
        ids = (*first.prompt.token_ids, *sample.token_ids, 40, 41, 42, 43)
        next_prompt = Prompt(f"turn-2-{sample.index}", ids, "")
        params = SamplingParams(1, 12, seed=sample.index)
        second.append(RolloutRequest(next_prompt, params, continues=(first.prompt.id, sample.index)))
    groups = [[c] for c in sorted(drained(engine, second), key=lambda c: c.prompt_id) if c.index == 0]
    groups = [group for group in groups if group[0].prompt_id.startswith("turn-2")]
    assert worst(model, second, groups) < TOLERANCE


def drained(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[Completion]:
    """All that comes after these requests."""
    engine.submit(requests)
    return drain(engine)


@check
def check_truncated_logprobs_are_renormalised_over_what_is_kept(
    engine: RolloutEngine, model: PreTrainedModel
) -> None:
    requests = [
        request(40, n=4, max_tokens=20, temperature=1.3, top_p=0.8),
        request(12, n=4, max_tokens=15, top_k=5),
        request(14, n=4, max_tokens=15, top_k=20, top_p=0.6, temperature=2.0),
        request(15, n=4, max_tokens=15, min_p=0.1, temperature=1.5),
        request(16, n=4, max_tokens=15, min_p=0.05, top_k=9, top_p=0.8, temperature=1.5),
    ]
    for asked, group in zip(requests, generate(engine, requests), strict=True):
        for completion in group:
            expected = truncated_logprobs(model, asked, completion)
            got = torch.tensor(completion.rollout_logprobs)
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@check
def check_what_truncation_left_is_said(engine: RolloutEngine, model: PreTrainedModel) -> None:
    truncated: list[dict[str, Any]] = [
        {"top_k": 5},
        {"top_k": 12, "top_p": 0.7},
        {"top_k": 12, "min_p": 0.1, "temperature": 1.5},
        {"top_k": 12, "min_p": 0.02, "top_p": 0.8, "temperature": 1.5},
    ]
    requests = [
        request(20 + i, n=3, max_tokens=12, return_candidates=True, **cut) for i, cut in enumerate(truncated)
    ]
    requests += [request(30, n=2, return_candidates=True), request(31, n=2, top_k=5)]
    *groups, whole, silent = generate(engine, requests)
    assert all(completion.candidates is None for completion in (*whole, *silent))
    for asked, group in zip(requests[: len(groups)], groups, strict=True):
        for completion in group:
            assert completion.candidates is not None
            said = completion.candidates.each()
            assert [int(ids[0]) for ids in said] == list(completion.token_ids)
            expected = truncated_distribution(model, asked, completion)
            for ids, left in zip(said, expected, strict=True):
                assert sorted(ids.tolist()) == left.nonzero()[:, 0].tolist()


def truncated_logprobs(model: PreTrainedModel, asked: RolloutRequest, completion: Completion) -> Tensor:
    """Log-probs over the tokens that truncation leaves; -inf for the others."""
    kept = truncated_distribution(model, asked, completion)
    chosen = torch.tensor(completion.token_ids)[:, None]
    return (kept / kept.sum(-1, keepdim=True)).gather(1, chosen)[:, 0].log()


def truncated_distribution(model: PreTrainedModel, asked: RolloutRequest, completion: Completion) -> Tensor:
    """Probabilities before each token, zero for what min-p, top-k and top-p leave out."""
    ids = torch.tensor([asked.prompt.token_ids + completion.token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(asked.prompt.token_ids) - 1 : -1].float()
    probs = (logits / asked.params.temperature).softmax(-1)
    rows = len(probs)
    return truncate(
        probs,
        torch.full((rows,), asked.params.top_k),
        torch.full((rows,), asked.params.top_p, dtype=torch.float64),
        torch.full((rows,), asked.params.min_p),
    )


@check
def check_temperature_0_takes_the_most_probable_token(engine: RolloutEngine, model: PreTrainedModel) -> None:
    asked = request(6, n=2, max_tokens=10, temperature=0.0, top_p=0.5)
    for completion in generate(engine, [asked])[0]:
        ids = torch.tensor([asked.prompt.token_ids + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(asked.prompt.token_ids) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == completion.token_ids


@check
def check_the_stop_token_belongs_to_the_completion(engine: RolloutEngine, model: PreTrainedModel) -> None:
    (group,) = generate(engine, [request(9, n=16, max_tokens=40, stop_token_ids=STOPS)])
    stopped = [c for c in group if c.finish_reason is FinishReason.STOP]
    assert stopped
    for completion in stopped:
        assert completion.token_ids[-1] in (EOS, *STOPS)
        assert not {EOS, *STOPS} & set(completion.token_ids[:-1])
    assert all(len(c.token_ids) == 40 for c in group if c.finish_reason is FinishReason.LENGTH)


@check
def check_the_same_seed_samples_the_same_tokens(engine: RolloutEngine, model: PreTrainedModel) -> None:
    first, again, other = (tokens(generate(engine, [request(9, n=4, seed=seed)]))[0] for seed in (5, 5, 6))
    assert first == again
    assert len(set(first)) == 4
    assert not set(first) & set(other)


@check
def check_the_global_generator_is_left_alone(engine: RolloutEngine, model: PreTrainedModel) -> None:
    before = torch.random.get_rng_state()
    generate(engine, [request(9)])
    assert torch.equal(before, torch.random.get_rng_state())


@check
def check_groups_are_handed_over_whole(engine: RolloutEngine, model: PreTrainedModel) -> None:
    engine.submit([request(9, n=2, max_tokens=60), request(4, n=3, max_tokens=2)])
    sizes: list[tuple[str, int]] = []
    while polled := engine.poll():
        sizes += [(c.prompt_id, len([o for o in polled if o.prompt_id == c.prompt_id])) for c in polled]
    assert sorted(set(sizes)) == [("prompt-4", 3), ("prompt-9", 2)]
    assert engine.poll() == []


@check
def check_abort_returns_what_was_sampled(engine: RolloutEngine, model: PreTrainedModel) -> None:
    requests = [request(9, n=2, max_tokens=400), request(10, n=2, max_tokens=400)]
    engine.submit(requests)
    # an engine that cannot stop within a group has finished one by now
    finished = engine.poll(timeout=0.0)
    engine.pause("abort")
    completions = finished + drain(engine)
    engine.resume()
    groups = [[c for c in completions if c.prompt_id == r.prompt.id] for r in requests]
    assert [len(group) for group in groups] == [2, 2]
    aborted = [c for c in completions if c.finish_reason is FinishReason.ABORT]
    assert len(aborted) >= 2
    assert all(len(c.token_ids) < 400 for c in aborted)
    assert max([0.0, *logprob_errors(model, requests, groups)]) < TOLERANCE
    assert len(generate(engine, [request(9)])[0]) == 2


@check
def check_wait_decodes_to_the_end_and_keep_continues(engine: RolloutEngine, model: PreTrainedModel) -> None:
    expected = sorted(c.token_ids for c in generate(engine, [request(9)])[0])
    engine.submit([request(9)])
    engine.pause("wait")
    assert sorted(c.token_ids for c in drain(engine)) == expected
    engine.resume()
    engine.submit([request(9)])
    engine.pause("keep")
    assert engine.poll(timeout=0.0) == []
    engine.resume()
    assert sorted(c.token_ids for c in drain(engine)) == expected


@check
def check_the_weights_in_force_are_those_of_the_last_update(
    engine: RolloutEngine, model: PreTrainedModel
) -> None:
    # the prompt is in the engine's cache, but keys and values of older weights must not be used
    requests = [request(70, n=3), request(9, n=2)]
    generate(engine, requests)
    other = moved(model)
    before = [p.detach().clone() for p in model.parameters()]
    report = engine.update_weights(Source(other), 3)
    groups = generate(engine, requests)
    assert (report.version, report.bytes) == (3, sum(p.nbytes for p in other.parameters()))
    assert worst(other, requests, groups) < TOLERANCE
    assert {span.version for group in groups for c in group for span in c.versions} == {3}
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
    engine.update_weights(Source(model), 0)
    assert worst(model, requests, generate(engine, requests)) < TOLERANCE


@check
def check_weights_in_flight_are_told_apart(engine: RolloutEngine, model: PreTrainedModel) -> None:
    asked = request(9, n=2, max_tokens=200)
    engine.submit([asked])
    completions = engine.poll(timeout=0.0)
    engine.pause("keep")
    engine.update_weights(Source(model), 8)
    engine.resume()
    completions += drain(engine)
    engine.update_weights(Source(model), 0)
    assert len(completions) == 2
    for completion in completions:
        spans = completion.versions
        assert [span.version for span in spans] in ([0, 8], [8], [0])
        assert (spans[0].start, spans[-1].end) == (0, len(completion.token_ids))
        assert all(a.end == b.start for a, b in pairwise(spans))
    # the weights are equal, so the log-probs must be those of one forward
    assert worst(model, [asked], [completions]) < TOLERANCE


@check
def check_bad_requests_are_refused_and_nothing_is_submitted(
    engine: RolloutEngine, model: PreTrainedModel
) -> None:
    long = request(9)
    engine.submit([long])
    with pytest.raises(ValueError, match="in flight already"):
        engine.submit([request(8), request(9)])
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit([request(0)])
    with pytest.raises(ValueError, match="was it tokenised for another"):
        bad = prompt(5, "bad")
        ids = (*bad.token_ids, 10_000)
        engine.submit([RolloutRequest(type(bad)(id="bad", token_ids=ids, content=""), long.params)])
    assert {c.prompt_id for c in drain(engine)} == {"prompt-9"}
