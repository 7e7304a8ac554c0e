"""Rankings of scored candidates: their probabilities, their gradient and nDCG, by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf.algos.reward_model.losses import bradley_terry
from rlhf.algos.reward_model.ranking import (
    expected_first,
    leave_one_out,
    ndcg,
    ranking_logprob,
    ranking_loss,
    sample_rankings,
)

ALL = torch.tensor(list(itertools.permutations(range(3))))


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_six_rankings_of_three() -> None:
    scores = f64(2.0, 1.0, 0.0)
    p = ranking_logprob(scores, ALL).exp()
    # 012: e^2 / (e^2 + e + 1) * e / (e + 1)
    assert p[0].item() == pytest.approx(math.e**2 / (math.e**2 + math.e + 1) * math.e / (math.e + 1))
    assert p.tolist() == pytest.approx([0.4863, 0.1789, 0.2156, 0.0292, 0.0658, 0.0242], abs=6e-5)
    assert p.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(ranking_logprob(scores + 3, ALL), p.log())
    # the first place alone is a softmax
    torch.testing.assert_close(ranking_logprob(scores, ALL, top=1).exp()[0::2], scores.softmax(-1))


def test_two_candidates_are_a_pair_of_bradley_terry() -> None:
    scores = f64(0.3, 1.1)
    expected = -bradley_terry(scores[:1], scores[1:])
    torch.testing.assert_close(ranking_logprob(scores, torch.tensor([[0, 1]])), expected)


def test_rankings_come_as_often_as_they_are_likely() -> None:
    scores = f64(2.0, 1.0, 0.0)
    drawn = sample_rankings(scores, 20_000, torch.Generator().manual_seed(0))
    share = (drawn[:, None] == ALL).all(-1).double().mean(0)
    # a share of p has a standard deviation of at most sqrt(.25 / 20000) = .0035
    torch.testing.assert_close(share, ranking_logprob(scores, ALL).exp(), rtol=0, atol=0.015)


def test_one_relevant_candidate_at_each_place() -> None:
    relevance = torch.eye(3, dtype=torch.float64)
    # 1 / log2(2), 1 / log2(3), 1 / log2(4)
    assert ndcg(relevance).tolist() == pytest.approx([1.0, 0.6309, 0.5], abs=5e-5)
    assert ndcg(relevance, top=1).tolist() == [1.0, 0.0, 0.0]
    # 1 - (.6309 + .5) / 2, .6309 - (1 + .5) / 2, .5 - (1 + .6309) / 2
    advantages = leave_one_out(ndcg(relevance))
    assert advantages.tolist() == pytest.approx([0.4345, -0.1191, -0.3155], abs=6e-5)
    assert advantages.sum().item() == pytest.approx(0.0)


def test_degrees_of_relevance_and_none_at_all() -> None:
    relevance = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    # (1 + 2 / log2 3) / (2 + 1 / log2 3)
    assert ndcg(relevance).tolist() == pytest.approx([(1 + 2 * 0.63093) / (2 + 0.63093), 0.0], abs=1e-5)


def test_the_gradient_is_that_of_the_mean_utility() -> None:
    scores = f64(0.5, -0.2, 0.1).requires_grad_()
    utility = ndcg(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[ALL])
    (ranking_logprob(scores, ALL).exp() * utility).sum().backward()
    exact = scores.grad
    scores.grad = None
    rankings = sample_rankings(scores, 40_000, torch.Generator().manual_seed(0))
    drawn = (rankings[:, None] == ALL).all(-1).long().argmax(-1)
    ranking_loss(scores, rankings, utility[drawn]).backward()
    assert exact is not None and scores.grad is not None
    torch.testing.assert_close(-scores.grad, exact, rtol=0, atol=5e-3)
    assert exact[2] > 0.05


def test_candidates_with_the_same_score_share_the_first_place() -> None:
    assert expected_first(f64(1.0, 1.0, 0.0), f64(0.0, 2.0, 4.0)) == (0 + 2) / 2 / 4
    assert expected_first(f64(1.0, 3.0, 0.0), f64(0.0, 2.0, 4.0)) == 2 / 4
