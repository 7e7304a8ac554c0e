"""The market of one feature, with half of the steps: what it shows within a second."""

from __future__ import annotations

import pytest

from benchmarks.market import check, market
from benchmarks.market_run import change, of_runs, of_table


def test_ratings_before_the_purchase_teach_promises_and_ratings_after_it_the_truth() -> None:
    immediate, hindsight = (market(late, steps=200, seeds=3) for late in (False, True))
    checks = check(immediate, hindsight)
    assert all(checks.values()), checks
    # every answer with 1/3: a mean rating of (1 - .3 + 0) / 3, and (.95 + .1 + .4) / 3 * (.3 - .7) of utility
    assert immediate["rating at the start"] == pytest.approx([0.7 / 3] * 3)
    assert hindsight["utility at the start"] == pytest.approx([1.45 / 3 * -0.4] * 3)
    # a customer who is always told yes: .95 * (.3 - .7); who is told the truth: .95 * .3 - .1 * .7
    assert immediate["utility at the end"] == pytest.approx([-0.38] * 3, abs=0.01)
    assert hindsight["utility at the end"] == pytest.approx([0.215] * 3, abs=0.02)


def test_the_change_is_that_of_the_same_customers() -> None:
    before, after = ({"utility by customer": means} for means in ([0.0, 1.0, -1.0], [0.5, 1.5, 0.5]))
    # .5, .5 and 1.5: mean .8333, and 1.96 standard errors of .5774 / sqrt(3)
    assert change(before, after, "utility") == [0.8333, 0.6533]


def test_a_line_goes_from_the_start_to_the_end() -> None:
    runs = {
        "sft": {"rating": [0.7, 0.1]},
        "immediate": {"rating": [1.0, 0.0]},
        "oracle": {"rating": [0.2, 0.3]},
    }
    assert of_runs(runs, "rating") == {
        "immediate": [([0.7, 1.0], [0.1, 0.0])],
        "hindsight": [([0.7, 0.2], [0.1, 0.3])],
    }
    ends = {"rating at the start": [0.1, 0.2], "rating at the end": [0.8, 0.9]}
    table = of_table({"immediate": ends, "hindsight": ends}, "rating")
    assert table["immediate"] == [((0.1, 0.8), (0.0, 0.0)), ((0.2, 0.9), (0.0, 0.0))]
