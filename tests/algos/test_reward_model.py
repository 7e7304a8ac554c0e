"""What a reward model learns, by hand; and how its confidence is compared with what came."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algos.reward_model.losses import (
    bradley_terry,
    centring,
    quality_gap,
    rating_loss,
    step_loss,
)
from rlhf.evaluation.calibration import Bin, calibration_error, pair_calibration, rating_calibration


def test_the_loss_of_a_pair_is_minus_the_log_of_its_probability():
    chosen = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, -1.0], dtype=torch.float64)
    loss = bradley_terry(chosen, rejected)
    assert loss.tolist() == pytest.approx([math.log(2), -math.log(1 / (1 + math.exp(-3)))])
    loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad[0].item() == pytest.approx(-0.5)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_margin_is_taken_from_what_the_chosen_one_is_ahead():
    # 2.0 - 0.8 = 1.2, less the margin 0.5: 0.7
    loss = bradley_terry(f64(2.0, 2.0), f64(0.8, 0.8), f64(0.0, 0.5))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1.2)), math.log1p(math.exp(-0.7))])
    assert loss.tolist() == pytest.approx([0.263282, 0.403186], abs=1e-6)


def test_centring_alone_sees_the_level_of_both_scores():
    chosen, rejected = f64(2.0), f64(0.8)
    # 0.01 (2.0 + 0.8)^2
    assert 0.01 * centring(chosen, rejected).item() == pytest.approx(0.0784)
    assert centring(chosen + 1, rejected + 1).item() == pytest.approx(4.8**2)
    torch.testing.assert_close(bradley_terry(chosen + 1, rejected + 1), bradley_terry(chosen, rejected))


def test_a_pair_far_apart_overflows_nowhere():
    far = torch.tensor([1e4])
    assert bradley_terry(far, -far).item() == 0.0
    assert bradley_terry(-far, far).item() == 2e4


def test_what_was_not_rated_is_not_learned():
    scores = torch.zeros(2, 2, requires_grad=True)
    loss = rating_loss(scores, torch.tensor([[1.0, float("nan")], [float("nan"), -2.0]]))
    assert loss.tolist() == [[0.5, 0.0], [0.0, 2.0]]
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 0.0], [0.0, 2.0]]


def test_a_step_is_good_or_bad_or_in_between():
    # sigmoid(ln 3) = .75: -log .75 for a good step, -log .25 for a bad one, their mean where it is half good
    loss = step_loss(f64(math.log(3), math.log(3), math.log(3)), f64(1.0, 0.0, 0.5))
    good, bad = -math.log(0.75), -math.log(0.25)
    assert loss.tolist() == pytest.approx([good, bad, (good + bad) / 2])


def test_five_terms_of_a_quality_gap():
    # differences 2 - 0, 2 - 0, 2 - (-2), 0 - (-2), 0 - (-2): four of 2 and one of 4
    loss = quality_gap(f64(2.0), f64(0.0), f64(0.0), f64(-2.0))
    assert loss.item() == pytest.approx(4 * math.log1p(math.exp(-2)) + math.log1p(math.exp(-4)))
    assert loss.item() == pytest.approx(0.525862, abs=1e-6)
    alike = quality_gap(*[f64(0.7)] * 4)
    assert alike.item() == pytest.approx(5 * math.log(2)) == pytest.approx(3.465736)
    torch.testing.assert_close(quality_gap(f64(3.0), f64(1.0), f64(1.0), f64(-1.0)), loss)


def test_confidence_is_compared_with_the_share_that_was_right():
    # all with confidence .75, of which one of two is right; and a tie, with .5
    margins = torch.tensor([math.log(3), -math.log(3), 0.0], dtype=torch.float64)
    bins = pair_calibration(margins, bins=10)
    assert [b.count for b in bins] == [1, 2]
    assert (bins[0].predicted, bins[0].observed) == (0.5, 0.5)
    assert (bins[1].predicted, bins[1].observed) == pytest.approx((0.75, 0.5))
    assert calibration_error(bins) == pytest.approx(2 / 3 * 0.25)


def test_a_model_whose_chances_are_true_has_next_to_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20_000, generator=generator, dtype=torch.float64).abs()
    came = torch.rand(20_000, generator=generator, dtype=torch.float64) < margins.sigmoid()
    signed = torch.where(came, margins, -margins)
    assert calibration_error(pair_calibration(signed)) < 0.01
    assert calibration_error(pair_calibration(5 * signed)) > 0.1


def test_scores_are_compared_with_ratings_in_ranges_of_equal_size():
    scores, ratings = torch.arange(8.0), torch.tensor([0.0, 1, 2, 3, 4, 5, 6, float("nan")])
    bins = rating_calibration(scores, ratings, bins=7)
    assert bins == [Bin(1, float(i), float(i)) for i in range(7)]
    assert calibration_error(rating_calibration(scores + 1.0, ratings, bins=2)) == pytest.approx(1.0)
