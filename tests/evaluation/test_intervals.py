"""pass@k by its definition; confidence intervals by published numbers and by properties they must have."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.evaluation.intervals import bootstrap, normal_interval, pass_at_k, wilson


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


def test_wilson_by_published_numbers() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3: 81/263, 15/148, 0/20
    for share, n, low, high in (
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def test_the_normal_interval_is_that_of_the_mean_over_prompts() -> None:
    # four prompts with mean 0.5 and sample variance 1/3: 0.5 +- 1.96 * sqrt(1/12), clipped to 0..1
    assert normal_interval([0.0, 0.0, 1.0, 1.0]) == (0.0, 1.0)
    low, high = normal_interval([0.4, 0.6] * 8)
    assert (low, high) == pytest.approx((0.5 - 0.0506, 0.5 + 0.0506), abs=1e-3)


def test_the_normal_interval_has_a_width_where_all_prompts_agree() -> None:
    low, high = normal_interval([1.0] * 10)
    # Wilson's interval of 10 out of 10
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert normal_interval([0.0] * 10)[1] == pytest.approx(1 - 0.7225, abs=1e-3)


def test_the_bootstrap_is_near_the_normal_interval_and_the_same_each_time() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap(values)
    margin = 1.96 * 0.5 / 400**0.5
    assert (low, high) == pytest.approx((0.5 - margin, 0.5 + margin), abs=0.006)
    assert bootstrap(values) == (low, high)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_has_a_width_where_all_agree(values: list[float]) -> None:
    low, high = bootstrap(values)
    assert 0 <= low <= high <= 1
    if len(set(values)) == 1:
        assert high - low > 0.01
