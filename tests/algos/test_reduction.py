"""Worked numbers: two sequences of 2 and 4 tokens, losses 1 and 2."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlhf.algos.reduction import (
    Reduction,
    sequence_mean_constant,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
    token_sum,
)
from rlhf.types import Counts

LOSS = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 1])
NORM_4 = partial(sequence_mean_constant, max_tokens=4)
WORKED = [
    (token_mean, 10 / 6),
    (sequence_mean_token_mean, 1.5),
    (sequence_mean_token_sum, 5.0),
    (NORM_4, 1.25),
    (token_sum, 10.0),
]


@pytest.mark.parametrize(("reduction", "expected"), WORKED)
def test_each_reduction_is_the_number_worked_out_by_hand(reduction: Reduction, expected: float):
    got = reduction(LOSS, torch.ones(6, dtype=torch.bool), SEQUENCE, Counts(tokens=6, sequences=2))
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "expected"), WORKED)
def test_masked_cells_count_for_nothing_even_when_they_hold_nan(reduction: Reduction, expected: float):
    loss = torch.tensor([1.0, 1.0, torch.nan, 9.0, 2.0, 2.0, 2.0, 2.0])
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    got = reduction(loss, mask, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), Counts(tokens=6, sequences=2))
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "expected"), WORKED)
def test_a_sequence_that_is_all_masked_adds_nothing(reduction: Reduction, expected: float):
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    loss = torch.cat([LOSS, torch.tensor([5.0, torch.nan])])
    sequence = torch.cat([SEQUENCE, torch.tensor([2, 2])])
    got = reduction(loss, mask, sequence, Counts(tokens=6, sequences=2))
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "expected"), WORKED)
def test_shares_of_microbatches_add_up_to_the_whole(reduction: Reduction, expected: float):
    counts, mask = Counts(tokens=6, sequences=2), torch.ones(6, dtype=torch.bool)
    first = reduction(LOSS[:2], mask[:2], SEQUENCE[:2], counts)
    second = reduction(LOSS[2:], mask[2:], SEQUENCE[2:] - 1, counts)
    assert (first + second).item() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "expected"), WORKED)
def test_an_update_without_tokens_is_zero_and_not_nan(reduction: Reduction, expected: float):
    got = reduction(LOSS, torch.zeros(6, dtype=torch.bool), SEQUENCE, Counts(tokens=0, sequences=0))
    assert got.item() == 0.0
