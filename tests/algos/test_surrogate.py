from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf.algos.surrogate import Surrogate, advantage_weighted, cispo, clip, drift, reinforce, sapo


def at(surrogate: Surrogate, ratio: float, advantage: float) -> tuple[float, float]:
    """Loss of a token, and its gradient by the log-probability."""
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss = surrogate(logprob, logprob.exp(), torch.tensor([advantage], dtype=torch.float64)).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), gradient.item()


PPO = partial(clip, low=0.2, high=0.28, dual=3.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.5, 1, -1.28), (1.25, 1, -1.25), (0.5, 1, -0.5), (1.5, -1, 1.5), (0.5, -1, 0.8), (5, -1, 3.0)],
)
def test_the_clipped_loss_is_the_number_worked_out_by_hand(ratio: float, advantage: float, loss: float):
    assert at(PPO, ratio, advantage)[0] == pytest.approx(loss)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1), (0.5, -1), (5, -1)])
def test_the_clip_stops_the_gradient_in_its_three_corners(ratio: float, advantage: float):
    assert at(PPO, ratio, advantage)[1] == 0.0


def test_without_the_dual_clip_a_bad_token_is_pushed_down_without_bound():
    assert at(partial(clip, low=0.2, high=0.28), 5.0, -1.0) == pytest.approx((5.0, 5.0))


def test_the_clip_counts_what_it_cuts_on_either_side():
    ratio = torch.tensor([1.5, 1.1, 0.5, 0.5, 5.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    metrics = PPO(ratio.log(), ratio, advantages).metrics
    assert metrics["clip_fraction"].tolist() == [True, False, False, True, False]
    assert metrics["clip_fraction/high"].tolist() == [True, False, False, False, False]
    assert metrics["clip_fraction/low"].tolist() == [False, False, False, True, False]
    assert metrics["clip_fraction/dual"].tolist() == [False, False, False, False, True]


@pytest.mark.parametrize(
    "surrogate", [PPO, partial(clip, low=0.2, high=0.2), partial(cispo, high=0.28), sapo, drift, reinforce]
)
@pytest.mark.parametrize("advantage", [-1.3, 0.0, 0.7])
def test_at_ratio_one_the_gradient_is_minus_the_advantage(surrogate: Surrogate, advantage: float):
    assert at(surrogate, 1.0, advantage)[1] == pytest.approx(-advantage, abs=1e-12)


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_drops():
    assert at(partial(cispo, high=0.28), 3.0, 1.0)[1] == pytest.approx(-1.28)
    assert at(partial(clip, low=0.2, high=0.28), 3.0, 1.0)[1] == 0.0


def test_cispo_has_a_lower_bound_only_when_asked():
    assert at(partial(cispo, high=0.28), 0.1, 1.0)[1] == pytest.approx(-0.1)
    assert at(partial(cispo, high=0.28, low=0.2), 0.1, 1.0)[1] == pytest.approx(-0.8)


@pytest.mark.parametrize(
    ("ratio", "positive", "negative"), [(1.5, 0.9400148, 0.9341398), (3.0, 0.4199744, 0.3887788)]
)
def test_the_sapo_gate_is_the_number_worked_out_by_hand(ratio: float, positive: float, negative: float):
    # d/dlogprob = f'(r) r
    assert at(sapo, ratio, 1.0)[1] == pytest.approx(-positive * ratio, rel=1e-6)
    assert at(sapo, ratio, -1.0)[1] == pytest.approx(negative * ratio, rel=1e-6)


def test_sapo_at_ratio_one_is_two_over_tau():
    assert at(sapo, 1.0, 1.0)[0] == pytest.approx(-2.0)
    assert at(sapo, 1.0, -1.0)[0] == pytest.approx(1.9047619)


def test_the_sapo_gate_is_symmetric_around_one():
    def gate(ratio: float) -> Tensor:
        return sapo(torch.zeros(1), torch.tensor([ratio]), torch.ones(1)).metrics["sapo/gate"]

    torch.testing.assert_close(gate(1.4), gate(0.6))


def test_advantage_weights_are_the_numbers_worked_out_by_hand():
    advantages = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    logprobs = torch.full_like(advantages, -1.0)
    expected = torch.tensor([0.367879, 1.0, 2.718282, 7.389056], dtype=torch.float64)
    weighted = advantage_weighted(logprobs, torch.ones_like(logprobs), advantages)
    torch.testing.assert_close(weighted.loss, expected, rtol=0, atol=1e-6)
    # the inverse temperature 3 and the cap 100 of IQL
    weighted = advantage_weighted(
        logprobs, torch.ones_like(logprobs), advantages, temperature=1 / 3, max_weight=100.0
    )
    expected = torch.tensor([0.049787, 1.0, 20.085537, 100.0], dtype=torch.float64)
    torch.testing.assert_close(weighted.loss, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "penalty", "gradient"),
    [
        # x = 0.5: 0.5 - 2 tanh(0.25) = 0.5 - 2 * 0.2449187; gradient r (-1 + tanh(0.25)^2) = 1.5 * -0.9400148
        (1.5, 1, 0.0101627, -1.4100222),
        # x = 1: 1 - 2 tanh(0.5) = 1 - 2 * 0.4621172; gradient 2 (-1 + 0.2135523)
        (2.0, 1, 0.0757657, -1.5728954),
        # x = log 2: 0.6931472 - 0.6 tanh(1.1552453) = 0.6931472 - 0.6 * 0.8194843; gradient r - tanh^2 =
        # 0.5 - 0.6715546: below 0, the token is pulled back
        (0.5, -1, 0.2014566, -0.1715546),
        # moved the wrong way: no penalty, the plain gradient -A r
        (0.5, 1, 0.0, -0.5),
        (1.5, -1, 0.0, 1.5),
        (1.0, 1, 0.0, -1.0),
    ],
)
def test_the_drift_is_the_number_worked_out_by_hand(
    ratio: float, advantage: float, penalty: float, gradient: float
):
    assert at(drift, ratio, advantage) == pytest.approx((-advantage * ratio + penalty, gradient), abs=1e-6)


@pytest.mark.parametrize("ratio", [1.1, 1.5, 3.0])
def test_the_drift_of_a_standardised_good_token_has_the_gradient_of_sapo(ratio: float):
    """1 - tanh(y)^2 = 4 s (1 - s) with s = sigmoid(2 y): for an advantage of 1 it is SAPO's gate."""
    assert at(drift, ratio, 1.0)[1] == pytest.approx(at(sapo, ratio, 1.0)[1])
