from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.kl import AdaptiveKL, k1, k2, k3, k3_plus

ZERO = torch.zeros(1, dtype=torch.float64)


def at(d: float) -> Tensor:
    return torch.tensor([d], dtype=torch.float64)


@pytest.mark.parametrize(
    ("d", "one", "two", "three"),
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.5, 0.5, 0.125, 0.1065307),
        (-0.5, -0.5, 0.125, 0.1487213),
        (1.0, 1.0, 0.5, 0.3678794),
    ],
)
def test_estimators_are_the_numbers_worked_out_by_hand(d: float, one: float, two: float, three: float):
    assert k1(at(d), ZERO).item() == pytest.approx(one)
    assert k2(at(d), ZERO).item() == pytest.approx(two)
    assert k3(at(d), ZERO).item() == pytest.approx(three, abs=1e-7)
    assert k3_plus(at(d), ZERO).item() == pytest.approx(three, abs=1e-7)


@given(st.floats(-30.0, 30.0))
def test_k3_is_never_negative_and_never_above_ten(d: float):
    assert 0.0 <= k3(at(d), ZERO).item() <= 10.0


@given(st.floats(-1e-3, 1e-3))
def test_k3_is_k2_where_policy_and_reference_nearly_agree(d: float):
    assert k3(at(d), ZERO).item() == pytest.approx(k2(at(d), ZERO).item(), rel=1e-3, abs=1e-15)


def test_k3_keeps_its_digits_in_fp32_where_both_nearly_agree():
    tiny = torch.tensor([1e-3])
    assert k3(tiny, torch.zeros(1)).item() == pytest.approx(4.998334e-7, rel=2e-3)


@pytest.mark.parametrize("d", [-1.5, -0.1, 0.0, 0.2, 3.0])
def test_gradients_are_d_for_k2_and_one_minus_exp_for_k3(d: float):
    expected = {k1: 1.0, k2: d, k3: 1.0 - torch.exp(-at(d)).item(), k3_plus: d}
    for estimator, gradient in expected.items():
        x = at(d).requires_grad_()
        estimator(x, ZERO).backward()
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(gradient, abs=1e-12), estimator.__name__


def test_estimators_have_the_expectation_of_the_exact_kl():
    # over a whole vocabulary the expectation is a sum: k1 and k3 are unbiased
    generator = torch.Generator().manual_seed(0)
    # close enough that the cap of k3 at 10, reached at d = -2.6, is not
    logits = torch.randn(2, 11, generator=generator, dtype=torch.float64) / 2
    policy, reference = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)


def test_the_expected_gradient_of_k1_is_zero_and_that_of_k2_is_the_gradient_of_the_kl():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(11, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    weight = policy.detach().exp()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    exact = gradient((policy.exp() * (policy - reference)).sum())
    torch.testing.assert_close(gradient((weight * k1(policy, reference)).sum()), torch.zeros_like(exact))
    torch.testing.assert_close(gradient((weight * k2(policy, reference)).sum()), exact)
    torch.testing.assert_close(gradient((weight * k3_plus(policy, reference)).sum()), exact)


def test_the_controller_moves_by_a_fifth_of_samples_over_horizon_at_most():
    controller = AdaptiveKL(coef=0.001, target=0.1, horizon=10_000)
    assert controller.update(0.3, 256).coef == pytest.approx(0.00100512)
    assert controller.update(0.0, 256).coef == pytest.approx(0.001 * (1 - 0.2 * 0.0256))
    assert controller.update(0.1, 256).coef == 0.001
    assert controller.coef == 0.001
