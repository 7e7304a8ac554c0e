"""The advantage scan: numbers worked out by hand, laws, and the coefficients of the Triton scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.kernels.gae import gae

MASK = torch.ones(3, dtype=torch.bool)
ONE = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (0.95, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1.0]),
        (1.0, [0.5, 0.4, 0.3], [1.0, 1.0, 1.0]),
        (0.0, [0.1, 0.1, 0.3], [0.6, 0.7, 1.0]),
    ],
)
def test_three_tokens_by_hand(lam: float, advantages: list[float], returns: list[float]) -> None:
    values = torch.tensor([0.5, 0.6, 0.7])
    got = gae(torch.tensor([0.0, 0.0, 1.0]), values, ONE, MASK, lam=lam)
    torch.testing.assert_close(got.advantages, torch.tensor(advantages))
    torch.testing.assert_close(got.returns, torch.tensor(returns))


def test_rewards_with_a_penalty_at_every_token_by_hand() -> None:
    rewards, values = torch.tensor([-0.01, 0.025, 1.0]), torch.tensor([0.5, 0.6, 0.7])
    got = gae(rewards, values, ONE, MASK, lam=0.95)
    # delta = [0.09, 0.125, 0.3]; A2 = 0.3, A1 = 0.125 + 0.95 * 0.3, A0 = 0.09 + 0.95 * 0.41
    torch.testing.assert_close(got.advantages, torch.tensor([0.4795, 0.41, 0.3]))
    torch.testing.assert_close(got.returns, torch.tensor([0.9795, 1.01, 1.0]))


def test_a_discount_by_hand() -> None:
    got = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.4]), ONE[:2], MASK[:2], gamma=0.5, lam=0.5)
    torch.testing.assert_close(got.advantages, torch.tensor([0.0 + 0.5 * 0.4 - 0.2 + 0.25 * 0.6, 0.6]))


def test_sequences_do_not_see_each_other() -> None:
    rewards, values = torch.rand(2, 7, dtype=torch.float64)
    sequence = torch.tensor([4, 4, 4, 9, 2, 2, 2])
    mask = torch.ones(7, dtype=torch.bool)
    together = gae(rewards, values, sequence, mask, gamma=0.9)
    parts = [gae(*(t[s] for t in (rewards, values, sequence, mask)), gamma=0.9) for s in _spans()]
    for name in ("advantages", "returns"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(p, name) for p in parts]))


def _spans() -> list[slice]:
    return [slice(0, 3), slice(3, 4), slice(4, 7)]


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = sum(lengths)
    rewards, values = torch.randn(2, count, generator=generator, dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)) * 7 - 3, torch.tensor(lengths))
    mask = torch.rand(count, generator=generator) < 0.7
    return rewards, values, sequence, mask


def plain_loop(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    rewards, values, sequence, mask = problem
    advantages, returns = torch.zeros(2, len(rewards), dtype=torch.float64)
    following: dict[int, tuple[float, float]] = {}
    for t in reversed(range(len(rewards))):
        if mask[t]:
            next_value, next_advantage = following.get(int(sequence[t]), (0.0, 0.0))
            advantages[t] = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage
            returns[t] = advantages[t] + values[t]
            following[int(sequence[t])] = (float(values[t]), float(advantages[t]))
    return advantages, returns


@settings(max_examples=60, deadline=None)
@given(problem=packed(), gamma=st.sampled_from([1.0, 0.97]), lam=st.sampled_from([0.0, 0.9, 1.0]))
def test_it_is_the_textbook_loop(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], gamma: float, lam: float
) -> None:
    truth = plain_loop(problem, gamma, lam)
    torch.testing.assert_close(tuple(gae(*problem, gamma=gamma, lam=lam)), truth, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(problem=packed(), lam=st.sampled_from([0.0, 0.9, 1.0]))
def test_the_coefficients_of_the_scan_give_the_same(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], lam: float
) -> None:
    triton_scan = pytest.importorskip("rlhf.kernels.gae.triton_scan", reason="Triton is not installed")
    d, c = triton_scan.coefficients(*problem, 0.97, lam)
    advantage, scanned = torch.zeros((), dtype=torch.float64), []
    for step in reversed(range(len(d))):
        advantage = d[step] + c[step] * advantage
        scanned.append(advantage)
    truth = gae(*problem, gamma=0.97, lam=lam).advantages
    kept = problem[3]
    torch.testing.assert_close(torch.stack(scanned).flip(0)[kept], truth[kept], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(problem=packed(), place=st.integers(0, 1000))
def test_inserting_masked_tokens_changes_nothing(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], place: int
) -> None:
    sequence = problem[2]
    place %= len(sequence)
    inserted = [
        torch.cat([tensor[: place + 1], extra.to(tensor.dtype)[None], tensor[place + 1 :]])
        for tensor, extra in zip(
            problem,
            (torch.tensor(9.0), torch.tensor(torch.nan), sequence[place], torch.tensor(0)),
            strict=True,
        )
    ]
    before, after = gae(*problem), gae(*inserted)
    left = torch.arange(len(sequence) + 1) != place + 1
    assert torch.equal(before.advantages, after.advantages[left])
    assert torch.equal(before.returns, after.returns[left])
    assert after.advantages[place + 1] == 0


@settings(max_examples=30, deadline=None)
@given(problem=packed())
def test_with_lambda_one_the_advantage_is_the_return_minus_the_value(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    rewards, values, sequence, mask = problem
    got = gae(*problem, lam=1.0)
    for name in sequence.unique():
        kept = (sequence == name) & mask
        to_come = rewards[kept].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(got.advantages[kept], to_come - values[kept])
        torch.testing.assert_close(got.returns[kept], to_come)


def test_each_token_may_have_its_own_lambda() -> None:
    rewards, values = torch.rand(2, 6)
    sequence, mask = torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6)
    both = gae(rewards, values, sequence, mask, lam=torch.tensor([0.3] * 3 + [0.9] * 3))
    for lam, part in ((0.3, slice(0, 3)), (0.9, slice(3, 6))):
        alone = gae(rewards, values, sequence, mask, lam=lam)
        torch.testing.assert_close(both.advantages[part], alone.advantages[part])


@pytest.mark.parametrize("mask", [torch.zeros(0), torch.zeros(3)])
def test_no_token_to_learn_from_gives_zeros(mask: Tensor) -> None:
    got = gae(torch.ones(len(mask)), torch.ones(len(mask)), torch.zeros(len(mask)), mask)
    assert (got.advantages == 0).all() and (got.returns == 0).all()


def test_an_impossible_call_says_why() -> None:
    three, four = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"expected rewards and values \[N\], got \[3\] and \[4\]"):
        gae(three, four, ONE, MASK)
    with pytest.raises(ValueError, match="give both one float type"):
        gae(three, three.double(), ONE, MASK)
    with pytest.raises(ValueError, match="needs CUDA tensors, got one on cpu"):
        gae(three, three, ONE, MASK, backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'tiled'; choose one of auto, reference, triton"):
        gae(three, three, ONE, MASK, backend="tiled")
