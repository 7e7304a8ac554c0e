"""Mass and entropy of the most probable tokens, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.evaluation.likelihood import topk_likelihood


def test_of_six_probabilities_the_three_largest_by_hand():
    # mass .5 + .2 + .1; entropy -.5 ln .5 - .2 ln .2 - .1 ln .1 = .346574 + .321888 + .230259 = .898720;
    # divided by the mass .625 .25 .125: .293752 + .346574 + .259930 = .900256
    logits = torch.tensor([[0.1, 0.5, 0.05, 0.2, 0.1, 0.05]], dtype=torch.float64).log() + 3.0
    assert topk_likelihood(logits, 3)[0].tolist() == pytest.approx([0.8, 0.898720, 0.900256], abs=1e-6)


def test_a_certain_token_has_no_entropy_and_all_of_the_mass():
    one_hot = torch.tensor([[-math.inf, 0.0, -math.inf, -math.inf]])
    assert topk_likelihood(one_hot, 2)[0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("vocabulary", [10, 40])
def test_of_a_uniform_distribution_the_normalised_entropy_is_ln_k(vocabulary: int):
    mass, raw, normalised = topk_likelihood(torch.zeros(1, vocabulary, dtype=torch.float64))[0].tolist()
    assert mass == pytest.approx(10 / vocabulary)
    assert raw == pytest.approx(10 / vocabulary * math.log(vocabulary))
    assert normalised == pytest.approx(math.log(10))


def test_of_a_small_vocabulary_all_tokens_are_taken():
    assert topk_likelihood(torch.zeros(2, 4))[1].tolist() == pytest.approx([1.0, math.log(4), math.log(4)])
