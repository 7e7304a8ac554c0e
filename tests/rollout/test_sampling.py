"""The counter-based uniforms, and the distributions that tokens are drawn from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.rollout.engine import SamplingParams
from rlhf.rollout.sampling import BLOCK, RowSampling, sample, splitmix64, stream_keys, truncate, uniform

CPU = torch.device("cpu")


def draws(logits: Tensor, count: int, **settings: float) -> tuple[Tensor, Tensor]:
    """`count` samples of one row of logits."""
    params = SamplingParams(n=count, max_tokens=1, seed=3, **settings)  # type: ignore[arg-type]
    rows = RowSampling.of([params] * count, range(count), CPU)
    return sample(logits.expand(count, -1), rows, torch.zeros(count, dtype=torch.int64))[:2]


def test_the_hash_is_splitmix64() -> None:
    # the first outputs of the reference generator started at 1234567
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = torch.full((3,), 1234567)
    assert [word % 2**64 for word in splitmix64(state, torch.arange(3)).tolist()] == reference


def test_any_python_integer_is_a_seed() -> None:
    keys = stream_keys([-1, 0, 2**64 - 1, 2**80 + 5, 5], [0] * 5, CPU).tolist()
    assert keys[0] == keys[2]
    assert keys[3] == keys[4]
    assert len({*keys}) == 3


def test_uniforms_are_uniform_and_streams_independent() -> None:
    seeds, indices, positions = 40, 40, 40
    seed = [s for s in range(seeds) for _ in range(indices)]
    keys = stream_keys(seed, list(range(indices)) * seeds, CPU)
    u = torch.stack([uniform(keys, torch.full_like(keys, t)) for t in range(positions)], 1)
    u = u.view(seeds, indices, positions)
    assert 0 <= u.min() < u.max() < 1
    assert u.unique().numel() == u.numel()
    # chi-squared over 64 bins: mean 63, standard deviation 11.2
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.2
    # neighbours in seed, in index and in position: correlation of m independent pairs is N(0, 1/m)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[:, :, 1:], u[:, :, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("vocabulary", [3, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_tokens_come_as_often_as_their_probability_says(vocabulary: int) -> None:
    logits = torch.linspace(-2, 2, vocabulary)[
        torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    ]
    count = 20_000
    tokens, logprobs = draws(logits, count, temperature=0.5)
    expected = (logits / 0.5).softmax(-1)
    frequency = torch.bincount(tokens, minlength=vocabulary) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() < 6 * deviation + 1e-4).all()
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=1e-6, rtol=0)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((300,), float("-inf"))
    logits[[0, 130, 299]] = torch.tensor([0.0, 1.0, 0.0])
    tokens, _ = draws(logits, 5000)
    assert set(tokens.tolist()) == {0, 130, 299}


def test_rows_of_one_batch_are_sampled_each_in_its_own_way() -> None:
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(n=1, max_tokens=9, seed=1),
        SamplingParams(n=1, max_tokens=9, seed=2, temperature=0.0, top_k=3, top_p=0.1),
        SamplingParams(n=1, max_tokens=9, seed=3, top_k=7),
        SamplingParams(n=1, max_tokens=9, seed=4, top_p=0.4, temperature=1.7),
        SamplingParams(n=1, max_tokens=9, seed=5, top_p=0.9, top_k=4, temperature=0.3),
        SamplingParams(n=1, max_tokens=9, seed=6, temperature=2.0),
    ]
    position = torch.arange(6)
    tokens, logprobs, _ = sample(logits, RowSampling.of(params, [0] * 6, CPU), position)
    for row, one in enumerate(params):
        alone = sample(logits[row : row + 1], RowSampling.of([one], [0], CPU), position[row : row + 1])
        assert alone[0].item() == tokens[row].item()
        assert alone[1].item() == pytest.approx(logprobs[row].item(), abs=1e-6)


def test_temperature_zero_takes_the_most_probable_token_with_its_logprob_at_temperature_one() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    tokens, logprobs = draws(logits, 4, temperature=0.0, top_p=0.1)
    assert tokens.tolist() == [1] * 4
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[1].expand(4))


def test_truncation_by_hand() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def kept(top_k: int | None, top_p: float | None, min_p: float | None = None) -> list[int]:
        k = None if top_k is None else torch.tensor([top_k])
        p = None if top_p is None else torch.tensor([top_p], dtype=torch.float64)
        m = None if min_p is None else torch.tensor([min_p])
        return truncate(probs, k, p, m)[0].nonzero()[:, 0].tolist()

    assert kept(2, None) == [1, 3]
    assert kept(0, None) == kept(9, None) == [0, 1, 2, 3]
    assert kept(None, 0.3) == kept(None, 0.39) == [1]
    assert kept(None, 0.5) == [1, 3]
    assert kept(None, 0.75) == [1, 2, 3]
    # 0.4 is 4/7 of what top-k leaves
    assert kept(2, 0.5) == [1]
    assert kept(2, 0.6) == [1, 3]
    # 0.4 times 0.4 is 0.16, times 0.6 it is 0.24
    assert kept(None, None, 0.4) == [1, 2, 3]
    assert kept(None, None, 0.6) == kept(0, 1.0, 0.6) == [1, 3]
    assert kept(None, None, 1.0) == [1]
    assert kept(3, 1.0, 0.6) == [1, 3]
    # 0.4 is 4/9 of what min-p leaves, with 0.3 it is 7/9
    assert kept(None, 0.7, 0.4) == [1, 3]
    assert kept(None, 0.8, 0.4) == [1, 2, 3]


def test_what_is_kept_is_said_with_the_drawn_token_first() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    params = [
        SamplingParams(n=1, max_tokens=9, seed=1),
        SamplingParams(n=1, max_tokens=9, seed=2, top_k=7, return_candidates=True),
        SamplingParams(n=1, max_tokens=9, seed=3, top_k=7),
        SamplingParams(n=1, max_tokens=9, seed=4, top_k=50, top_p=0.4, min_p=0.1, return_candidates=True),
        SamplingParams(n=1, max_tokens=9, seed=5, top_k=1, return_candidates=True),
        SamplingParams(n=1, max_tokens=9, seed=6, temperature=0.0, top_k=3, return_candidates=True),
    ]
    rows = RowSampling.of(params, [0] * 6, CPU)
    drawn = sample(logits, rows, torch.zeros(6, dtype=torch.int64))
    assert drawn.candidates is not None
    kept = drawn.candidates.each()
    assert [len(ids) for ids in (*kept[:3], *kept[4:])] == [0, 7, 0, 1, 0]
    assert set(kept[1].tolist()) == set(logits[1].topk(7).indices.tolist())
    for row in (1, 3, 4):
        assert kept[row][0] == drawn.tokens[row]
        among = logits[row, kept[row].long()].log_softmax(-1)
        assert drawn.logprobs[row].item() == pytest.approx(among[0].item(), abs=1e-6)


def test_a_row_draws_the_same_whether_it_says_what_is_kept_or_not() -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(2))
    found = [
        sample(logits, RowSampling.of([params] * 64, range(64), CPU), torch.zeros(64, dtype=torch.int64))
        for says in (False, True)
        for params in [SamplingParams(n=1, max_tokens=9, seed=1, top_k=40, top_p=0.9, return_candidates=says)]
    ]
    assert found[0].candidates is None
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].logprobs, found[1].logprobs)


def test_what_is_kept_must_be_bounded() -> None:
    with pytest.raises(ValueError, match="return_candidates needs top_k"):
        SamplingParams(n=1, max_tokens=1, seed=0, top_p=0.9, return_candidates=True)
    # nothing is truncated: there is nothing to say
    SamplingParams(n=1, max_tokens=1, seed=0, return_candidates=True)


def test_ties_at_the_edge_are_kept_together() -> None:
    probs = torch.tensor([[0.2, 0.3, 0.2, 0.3]])
    assert (truncate(probs, torch.tensor([3]), None) > 0).all()
    assert (truncate(probs, torch.tensor([1]), None) > 0).tolist() == [[False, True, False, True]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 400),
    top_k=st.integers(0, 420),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 5.0),
)
def test_logprobs_are_renormalised_over_what_truncation_left(
    seed: int, vocabulary: int, top_k: int, top_p: float, temperature: float
) -> None:
    """Compares with the log-softmax of logits that are masked as `SamplingParams` documents."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    tokens, logprobs = draws(logits, 16, top_k=top_k, top_p=top_p, temperature=temperature)
    scaled = logits.double() / temperature
    order = scaled.argsort(descending=True)[: top_k or vocabulary]
    share = scaled[order].softmax(-1).cumsum(-1)
    support = order[: int((share < top_p - 1e-6).sum()) + 1]
    expected = scaled[support].log_softmax(-1)
    places = {token: place for place, token in enumerate(support.tolist())}
    chosen = [places.get(token) for token in tokens.tolist()]
    # at the very edge of top-p rounding may keep one token more or less
    if abs(share - top_p).min() > 1e-5:
        assert None not in chosen
        torch.testing.assert_close(logprobs.double(), expected[chosen], atol=1e-5, rtol=1e-5)
