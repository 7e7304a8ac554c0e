"""pass@k by its definition; confidence intervals by published numbers and by properties they must have."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.evaluation.intervals import mean_interval, pass_at_k, share_interval


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    correct = [True] * c + [False] * (n - c)
    draws = list(combinations(correct, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_one_is_the_accuracy_and_more_draws_never_hurt() -> None:
    assert pass_at_k(8, 2, 1) == 0.25
    values = [pass_at_k(8, 2, k) for k in range(1, 9)]
    assert values == sorted(values) and values[-1] == 1.0


@pytest.mark.parametrize("bad", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_a_draw_that_cannot_be_made_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(*bad)


def test_the_interval_of_shares_is_agresti_and_coulls_with_one_sample_of_each_prompt() -> None:
    # plus four: 0 of 20 has 2/24 +- 1.96 sqrt(2/24 * 22/24 / 24), 15 of 148 has 17/152 +- 1.96 sqrt(...)
    for successes, n in ((0, 20), (15, 148), (10, 10)):
        p = (successes + 2) / (n + 4)
        margin = 1.959964 * (p * (1 - p) / (n + 4)) ** 0.5
        expected = max(0.0, p - margin), min(1.0, p + margin)
        assert share_interval([1.0] * successes + [0.0] * (n - successes)) == pytest.approx(expected)


def test_one_correct_completion_more_hardly_moves_the_interval() -> None:
    """Six prompts with eight samples each: none correct, and one of the 48."""
    none, one = share_interval([0.0] * 6), share_interval([0.125] + [0.0] * 5)
    assert none[0] == one[0] == 0.0
    assert none[1] < one[1] < none[1] + 0.03


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_has_a_width_always_and_lies_within_0_and_1(shares: list[float]) -> None:
    low, high = share_interval(shares)
    assert 0 <= low < high <= 1 and high - low > 0.01
    assert low <= sum(shares) / len(shares) + 1e-9 or low == 0
    mirrored = share_interval([1 - share for share in shares])
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_more_prompts_make_it_narrower() -> None:
    widths = [high - low for low, high in (share_interval([0.0, 1.0] * n) for n in (3, 10, 100))]
    assert widths == sorted(widths, reverse=True) and widths[-1] < 0.14


def test_the_interval_of_a_mean_reward_is_the_normal_one() -> None:
    # mean 2, sample variance 20/3, so 2 +- 1.96 sqrt(20/12)
    low, high = mean_interval([-1.0, 1.0, 3.0, 5.0])
    assert (low, high) == pytest.approx((2 - 2.5303, 2 + 2.5303), abs=1e-3)
    assert mean_interval([0.3]) == (0.3, 0.3)
