"""The interval of an accuracy is over prompts, and never of width zero."""

from __future__ import annotations

import pytest

from rlhf.evaluation.accuracy import interval


def test_the_interval_is_that_of_the_mean_over_prompts():
    # mean 0.5, sample variance 1/3 of four prompts: 0.5 +- 1.96 * sqrt(1/12), cut to 0..1
    assert interval([0.0, 0.0, 1.0, 1.0]) == (0.0, 1.0)
    low, high = interval([0.4, 0.6] * 8)
    assert (low, high) == pytest.approx((0.5 - 0.0506, 0.5 + 0.0506), abs=1e-3)


def test_prompts_that_all_agree_leave_some_doubt():
    low, high = interval([1.0] * 10)
    # Wilson's interval of 10 out of 10
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert interval([0.0] * 10)[1] == pytest.approx(1 - 0.7225, abs=1e-3)
