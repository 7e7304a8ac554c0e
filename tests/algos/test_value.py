from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algos.value import RunningMoments, adaptive_lambda, explained_variance, value_loss
from rlhf.kernels.gae import gae


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(("target", "loss", "gradient"), [(0.8, 0.02, 0.2), (2.0, 0.845, 0.0)])
def test_the_clipped_value_loss_is_the_number_worked_out_by_hand(target: float, loss: float, gradient: float):
    # V = 1 from V_old = .5: clipped to .7; where the clipped branch wins there is no gradient
    values = f64(1.0).requires_grad_()
    got = value_loss(values, f64(0.5), f64(target))
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient)


def test_without_a_clip_it_is_half_the_squared_error():
    assert value_loss(f64(1.0), f64(0.5), f64(3.0), clip=None).item() == 2.0


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns = torch.randn(50, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50) % 3 > 0
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((50,), 7.0), returns, mask) == pytest.approx(0.0, abs=1e-9)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    values = returns + 0.3 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    kept, error = returns[mask].double().numpy(), (returns - values)[mask].double().numpy()
    assert explained_variance(values, returns, mask) == pytest.approx(1 - np.var(error) / np.var(kept))


def test_explained_variance_of_returns_that_do_not_vary_is_no_number():
    assert np.isnan(
        explained_variance(torch.randn(5), torch.full((5,), 0.1), torch.ones(5, dtype=torch.bool))
    )
    assert np.isnan(explained_variance(torch.randn(5), torch.randn(5), torch.zeros(5, dtype=torch.bool)))


def test_lambda_grows_with_the_length_as_in_the_paper():
    got = adaptive_lambda(torch.tensor([1, 20, 100, 1000, 10_000]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.8, 0.98, 0.998]))


def test_gae_takes_a_lambda_of_each_sequence():
    rewards, values = f64(0, 0, 1, 0, 1), f64(0.5, 0.6, 0.7, 0.1, 0.2)
    sequence, ones = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, dtype=torch.bool)
    both = gae(rewards, values, sequence, ones, lam=f64(1.0, 0.0)[sequence])[0]
    torch.testing.assert_close(both[:3], gae(rewards, values, sequence, ones, lam=1.0)[0][:3])
    torch.testing.assert_close(both[3:], gae(rewards, values, sequence, ones, lam=0.0)[0][3:])


def test_moments_are_the_numbers_worked_out_by_hand():
    first = RunningMoments().update(f64(1, 2, 3, 4))
    assert (first.mean, first.variance, first.std) == pytest.approx((2.5, 1.25, 1.2909944))
    second = first.update(f64(5, 7))
    assert (second.mean, second.variance, second.std) == pytest.approx((3.6666667, 3.8888889, 2.1602469))
    assert second.std == pytest.approx(np.std([1, 2, 3, 4, 5, 7], ddof=1))
    torch.testing.assert_close(second.normalize(f64(5, 7), clip=0.8), f64(0.617213, 0.8), rtol=0, atol=1e-6)


def test_moments_of_nothing_change_nothing():
    assert RunningMoments().update(f64()) == RunningMoments()
    torch.testing.assert_close(RunningMoments().normalize(f64(3.0)), f64(3.0))


def test_moments_over_two_ranks_are_those_of_their_union():
    mine, other = f64(1, 2, 3), f64(5, 7, 11, 13)
    mean = torch.cat([mine, other]).mean()
    sums = [torch.stack([torch.tensor(4.0, dtype=torch.float64), other.sum()]), (other - mean).square().sum()]
    all_sum: Callable[[Tensor], Tensor] = lambda t: t + sums.pop(0)  # noqa: E731
    together = RunningMoments().update(torch.cat([mine, other]))
    apart = RunningMoments().update(mine, all_sum=all_sum)
    assert (apart.mean, apart.variance) == pytest.approx((together.mean, together.variance))
