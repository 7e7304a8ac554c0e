from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.perception import perception_terms

ALL = torch.ones(3, dtype=torch.bool)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_terms_are_the_numbers_worked_out_by_hand():
    logprobs = f64(-0.1, -0.5, -1.0).requires_grad_()
    kl, entropy, masked_entropy = perception_terms(logprobs, f64(-0.3, -2.5, -0.8), ALL)
    torch.testing.assert_close(kl.detach(), f64(0.018731, 1.135335, 0.021403), rtol=0, atol=1e-6)
    torch.testing.assert_close(-0.02 * kl.mean().detach(), f64(-0.0078365)[0], rtol=0, atol=1e-7)
    kl.sum().backward()
    torch.testing.assert_close(logprobs.grad, f64(0.181269, 0.864665, -0.221403), rtol=0, atol=1e-6)
    torch.testing.assert_close(0.05 * entropy.mean().detach(), f64(0.0266667)[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(0.05 * masked_entropy.mean(), f64(0.06)[0])


def test_a_policy_that_does_not_look_has_no_kl_and_no_gradient():
    logprobs = f64(-0.1, -0.5, -1.0).requires_grad_()
    kl = perception_terms(logprobs, logprobs.detach(), ALL).kl
    kl.sum().backward()
    assert (kl == 0.0).all()
    assert logprobs.grad is not None
    assert (logprobs.grad == 0.0).all()


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=5))
def test_the_kl_is_never_negative(pairs: list[tuple[float, float]]):
    plain, masked = (f64(*x) for x in zip(*pairs, strict=True))
    assert (perception_terms(plain, masked, torch.ones(len(pairs), dtype=torch.bool)).kl >= 0).all()


def test_tokens_outside_the_mask_have_no_part():
    logprobs = f64(-0.1, torch.nan, -1.0).requires_grad_()
    mask = torch.tensor([True, False, True])
    terms = perception_terms(logprobs, f64(-0.3, torch.nan, -0.8), mask)
    torch.stack(terms).sum().backward()
    assert all(term[1] == 0.0 for term in terms)
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_a_cap_bounds_the_kl_of_a_token():
    kl = perception_terms(f64(-0.1, -0.5, -1.0), f64(-0.3, -2.5, -0.8), ALL, max_kl=0.2).kl
    torch.testing.assert_close(kl, f64(0.018731, 0.2, 0.021403), rtol=0, atol=1e-6)
