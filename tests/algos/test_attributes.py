"""Objectives read off frozen states: ridge regression by hand, and the correction for verbosity."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algos.reward_model.attributes import (
    fit_attributes,
    ridge,
    spearman,
    verbosity_penalties,
    without_verbosity,
)
from rlhf.models.heads import Gate


def f64(*rows: list[float] | float) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_ridge_divides_by_the_squares_and_the_strength() -> None:
    # one column: w = sum(x y) / (sum(x^2) + a) = (1*2 + 2*3) / (1 + 4 + a), a = 0 and 3
    found = ridge(f64([1.0], [2.0]), f64(2.0, 3.0), (1e-30, 3.0))
    assert found[:, 0].tolist() == pytest.approx([8 / 5, 8 / 8])
    # two columns that never occur together: each by itself
    found = ridge(f64([1.0, 0.0], [0.0, 2.0]), f64(2.0, 3.0), (1.0,))
    assert found[0].tolist() == pytest.approx([2 / 2, 6 / 5])


def test_a_missing_rating_is_not_fitted_and_the_others_give_the_rule_back() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    rule = f64([1.0, -2.0, 0.0], [0.0, 0.5, 3.0])
    ratings = states @ rule.mT
    ratings[:20, 1] = math.nan
    # without noise the weakest penalty fits best
    weights, strengths = fit_attributes(states, ratings, torch.Generator().manual_seed(1))
    assert strengths == [1e-4, 1e-4]
    torch.testing.assert_close(weights, rule, rtol=0, atol=1e-4)
    ratings[4:, 1] = math.nan
    ratings[:4, 1] = 1.0
    with pytest.raises(ValueError, match="attribute 1 has 4 ratings"):
        fit_attributes(states, ratings, generator)


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    a = f64(1.0, 2.0, 3.0, 4.0)
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, variances 5 and 4.5
    assert spearman(a, f64(0.0, 0.0, 1.0, 2.0)) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert spearman(a, torch.zeros(4, dtype=torch.float64)) == 0.0


def test_verbosity_is_taken_out_of_what_rises_with_it_and_of_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    verbose, noise = torch.randn(2, 2000, generator=generator, dtype=torch.float64)
    scores = torch.stack([0.5 * verbose + noise, -0.5 * verbose + noise, verbose, 2 * verbose], -1)
    lam = verbosity_penalties(scores, 2)
    # half of it is in the first; the second falls with it; itself has 1, and so has what rises at every lam
    assert 0.4 <= lam[0] <= 0.5 and lam[1:] == [0.0, 1.0, 1.0]
    corrected = scores @ without_verbosity(torch.eye(4, dtype=torch.float64), lam, 2).mT
    assert spearman(corrected[:, 0], verbose) <= 0.03 < spearman(scores[:, 0], verbose)
    assert corrected[:, 2].abs().max() == 0


def test_a_tenth_of_the_verbosity_is_subtracted_by_hand() -> None:
    # scores .8, .6 and verbosity .9 as a linear map of one state: .8 - .1 * .9 = .71, .6 - .09 = .51
    weights = without_verbosity(f64([0.8], [0.6], [0.9]), [0.1, 0.1, 1.0], 2)
    assert (weights @ f64(1.0)).tolist() == pytest.approx([0.71, 0.51, 0.0])


def test_a_gate_whose_outputs_are_alike_gives_the_mean() -> None:
    gate = Gate(4, 3, width=5, layers=2, temperature=10.0).double()
    last = gate.network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        weights = gate(torch.randn(2, 4, dtype=torch.float64))
        assert (weights @ f64(0.9, 0.6, 0.3)).tolist() == pytest.approx([0.6, 0.6])
        # outputs 10 ln 2, 0, 0 at temperature 10: shares 2, 1, 1 of the scale
        last.bias.copy_(f64(10 * math.log(2), 0.0, 0.0))
        gate.scale.fill_(3.0)
        weights = gate(torch.randn(2, 4, dtype=torch.float64))
    torch.testing.assert_close(weights, f64([1.5, 0.75, 0.75]).expand(2, 3))
