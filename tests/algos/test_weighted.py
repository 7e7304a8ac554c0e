from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from rlhf.algos.weighted import a_lol, awr, awr_weights

ONE = torch.zeros(3, dtype=torch.long)
ALL = torch.ones(3, dtype=torch.bool)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_lol_is_the_number_worked_out_by_hand():
    # R .8, V .5, NLL 6, of the reference 5.5: w = .606531
    loss = a_lol(f64(-1, -2, -3), f64(-0.8, -2.5, -2.2), f64(0.8 - 0.5), ONE, ALL)
    assert loss.item() == pytest.approx(1.0917552)


@pytest.mark.parametrize(("ratio", "expected"), [("token", 1.6392480), ("none", 1.8)])
def test_its_variants_are_the_numbers_worked_out_by_hand(ratio: Literal["token", "none"], expected: float):
    # token by token: w = .818731, 1.648721, .449329
    loss = a_lol(f64(-1, -2, -3), f64(-0.8, -2.5, -2.2), f64(0.3), ONE, ALL, ratio=ratio)
    assert loss.item() == pytest.approx(expected)


def test_what_turned_out_badly_is_not_learned_from():
    logprobs = f64(-1, -2, -3).requires_grad_()
    loss = a_lol(logprobs, f64(-0.8, -2.5, -2.2), f64(0.5 - 0.8), ONE, ALL)
    loss.sum().backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None
    assert (logprobs.grad == 0.0).all()


def test_at_the_reference_the_ratio_has_no_part():
    logprobs = f64(-1, -2, -3)
    losses = [
        a_lol(logprobs, logprobs, f64(0.3), ONE, ALL, ratio=r).item() for r in ("sequence", "token", "none")
    ]
    assert losses == [pytest.approx(1.8)] * 3


def test_the_kl_term_pulls_to_the_reference():
    logprobs = f64(-1, -2, -3).requires_grad_()
    a_lol(logprobs, f64(-0.8, -2.5, -2.2), f64(-1.0), ONE, ALL, kl_coef=0.1).sum().backward()
    torch.testing.assert_close(logprobs.grad, f64(0.1, 0.1, 0.1))


def test_masked_tokens_have_no_part_even_when_they_hold_nan():
    logprobs = f64(-1, -2, -3, torch.nan).requires_grad_()
    mask = torch.tensor([True, True, True, False])
    loss = a_lol(logprobs, f64(-0.8, -2.5, -2.2, torch.nan), f64(0.3), torch.zeros(4, dtype=torch.long), mask)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.0917552)
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_advantage_weights_are_the_numbers_worked_out_by_hand():
    advantages = f64(-1, 0, 1, 2)
    torch.testing.assert_close(
        awr_weights(advantages), f64(0.367879, 1, 2.718282, 7.389056), rtol=0, atol=1e-6
    )
    capped = awr_weights(advantages, temperature=1 / 3, max_weight=100.0)
    torch.testing.assert_close(capped, f64(0.049787, 1, 20.085537, 100), rtol=0, atol=1e-6)
    normalized = awr_weights(advantages) / awr_weights(advantages).sum()
    torch.testing.assert_close(normalized, f64(0.032059, 0.087144, 0.236883, 0.643914), rtol=0, atol=1e-6)
    torch.testing.assert_close(awr(-torch.ones(4, dtype=torch.float64), advantages), awr_weights(advantages))


def test_weights_carry_no_gradient():
    advantages = f64(1.0).requires_grad_()
    assert not awr(f64(-1.0), advantages).requires_grad
