"""examples/flow: both gradient estimators point where they should, on a flow that is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from examples.flow.flow import LOSSES, Flow, matching_loss, sample, sample_noisily

W = torch.tensor([1.0, 0.0])


def gaussian(shift: Tensor) -> Flow:
    """The velocity E[e - x0 | x] of data N(0, 1), (2 t - 1) x / ((1 - t)^2 + t^2), plus a shift."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * ((2 * t - 1) / ((1 - t) ** 2 + t**2))[:, None] + shift

    return velocity


def score(x: Tensor) -> Tensor:
    return x @ W


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_both_samplers_keep_the_distribution():
    flow, random = gaussian(torch.zeros(2)), seeded()
    noise = torch.randn(20_000, 2, generator=random)
    # up to what ten Euler steps leave
    assert sample(flow, noise).std().item() == pytest.approx(1.0, abs=0.12)
    assert sample_noisily(flow, noise, random)[-1].std().item() == pytest.approx(1.0, abs=0.12)


def gradient(method: str, count: int = 40_000) -> Tensor:
    """By a constant shift of the velocity, of the loss for a reward that grows along W."""
    shift = torch.zeros(2, requires_grad=True)
    (found,) = torch.autograd.grad(LOSSES[method](gaussian(shift), count, score, seeded()), shift)
    return found


def test_awm_has_the_gradient_worked_out_by_hand():
    """E[A (v - (e - x0))] with A = x0 / s, s the deviation of the samples x0, which is 1 up to Euler's error.

    v = (2 t - 1) x_t / ((1 - t)^2 + t^2), so it is s t / ((1 - t)^2 + t^2); over t from 0 to 1 its mean is by
    symmetry half of the integral of s / ((1 - t)^2 + t^2), which is s pi / 4.
    """
    noise = torch.randn(40_000, 2, generator=seeded())
    deviation = float(sample(gaussian(torch.zeros(2)), noise)[:, 0].std())
    assert gradient("AWM").tolist() == pytest.approx([deviation * math.pi / 4, 0.0], abs=0.04)


def test_flow_grpo_has_the_gradient_of_the_expected_reward():
    """The same noise with the velocity shifted up and down: a flow that is linear has an exact difference."""
    means: list[float] = []
    for shift in (0.1, -0.1):
        random = seeded()
        path = sample_noisily(gaussian(shift * W), torch.randn(40_000, 2, generator=random), random)
        means.append(float(score(path[-1]).mean() / score(path[-1]).std()))
    expected = -(means[0] - means[1]) / 0.2
    assert expected > 0.5
    assert gradient("Flow-GRPO").tolist() == pytest.approx([expected, 0.0], abs=0.05)


def test_the_loss_of_the_pre_training_is_least_at_the_true_velocity():
    random = seeded()
    x0, noise = torch.randn(2, 5000, 2, generator=random)
    t = torch.rand(5000, generator=random)
    true, shifted = (
        matching_loss(gaussian(torch.full((2,), shift)), x0, t, noise).mean() for shift in (0.0, 0.3)
    )
    # a shift of s adds s^2
    assert float(shifted - true) == pytest.approx(0.09, abs=0.02)
