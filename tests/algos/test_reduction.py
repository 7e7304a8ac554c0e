"""Worked numbers: two sequences of 2 and 4 tokens, losses 1 and 2; the policy sampled one of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algos.reduction import (
    Reduction,
    Where,
    own_mean_token_sum,
    sequence_mean_constant,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
    token_sum,
    turn_means,
)
from rlhf.types import Counts

LOSS = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 1])
# the second one calls a tool with its first token, and answers with the other three
TURN = torch.tensor([0, 0, 0, 1, 1, 1])
COUNTS = Counts(tokens=6, sequences=2, sampled=1, earlier_tokens=1, last_tokens=5)
WORKED = [
    (token_mean, 10 / 6),
    (sequence_mean_token_mean, 1.5),
    (sequence_mean_token_sum, 5.0),
    (own_mean_token_sum, 10.0),
    (partial(sequence_mean_constant, max_tokens=4), 1.25),
    (token_sum, 10.0),
    # 0.5 * 2 / 1 + (1 + 1 + 2 + 2 + 2) / 5
    (turn_means(0.5), 1.0 + 8 / 5),
]
worked = pytest.mark.parametrize(("reduction", "expected"), WORKED)


def everything(counts: Counts = COUNTS) -> Where:
    return Where(torch.ones(6, dtype=torch.bool), SEQUENCE, TURN, counts)


@worked
def test_each_reduction_is_the_number_worked_out_by_hand(reduction: Reduction, expected: float):
    assert reduction(LOSS, everything()).item() == pytest.approx(expected)


@worked
def test_masked_cells_count_for_nothing_even_when_they_hold_nan(reduction: Reduction, expected: float):
    """Such as the words of a tool, which count with the turn before them."""
    loss = torch.tensor([1.0, 1.0, 2.0, torch.nan, 9.0, 2.0, 2.0, 2.0])
    mask = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    where = Where(
        mask, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), COUNTS
    )
    assert reduction(loss, where).item() == pytest.approx(expected)


@worked
def test_a_sequence_that_is_all_masked_adds_nothing(reduction: Reduction, expected: float):
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    loss = torch.cat([LOSS, torch.tensor([5.0, torch.nan])])
    more = torch.tensor([2, 2])
    where = Where(mask, torch.cat([SEQUENCE, more]), torch.cat([TURN, more]), COUNTS)
    assert reduction(loss, where).item() == pytest.approx(expected)


@worked
def test_shares_of_microbatches_add_up_to_the_whole(reduction: Reduction, expected: float):
    whole = everything()
    first = reduction(LOSS[:2], Where(whole.mask[:2], SEQUENCE[:2], TURN[:2], COUNTS))
    second = reduction(LOSS[2:], Where(whole.mask[2:], SEQUENCE[2:] - 1, TURN[2:], COUNTS))
    assert (first + second).item() == pytest.approx(expected)


@worked
def test_an_update_without_tokens_is_zero_and_not_nan(reduction: Reduction, expected: float):
    where = Where(torch.zeros(6, dtype=torch.bool), SEQUENCE, TURN, Counts(tokens=0, sequences=0))
    assert reduction(LOSS, where).item() == 0.0


@given(seed=st.integers(0, 10_000))
def test_means_by_turn_weighted_by_their_tokens_are_the_mean_over_all_tokens(seed: int):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (6,), generator=draw)
    # two sequences of three turns
    turn, sequence = torch.arange(3).repeat(2), torch.arange(2).repeat_interleave(3)
    turn, sequence = turn.repeat_interleave(lengths), sequence.repeat_interleave(lengths)
    loss = torch.randn(len(turn), generator=draw, dtype=torch.float64)
    last = int(lengths[[2, 5]].sum())
    counts = Counts(tokens=len(turn), sequences=2, earlier_tokens=len(turn) - last, last_tokens=last)
    where = Where(torch.ones(len(turn), dtype=torch.bool), sequence, turn, counts)
    # E / L * mean of E + mean of L = (sum of E + sum of L) / L, and the mean over all is that sum / (E + L)
    both = turn_means(counts.earlier_tokens / last)(loss, where)
    expected = token_mean(loss, where) * len(turn) / last
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-12)
