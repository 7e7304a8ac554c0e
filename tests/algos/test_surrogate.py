from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf.algos.surrogate import Surrogate, advantage_weighted, cispo, clip, reinforce, sapo


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
    "surrogate", [PPO, partial(clip, low=0.2, high=0.2), partial(cispo, high=0.28), sapo, reinforce]
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
