"""The market of one feature, with half of the steps: what it shows within a second."""

from __future__ import annotations

import pytest

from benchmarks.market import check, market


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
