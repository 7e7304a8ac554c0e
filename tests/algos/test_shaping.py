from __future__ import annotations

import pytest

from rlhf.algos.shaping import keep_all, keep_mixed, overlong, unshaped
from rlhf.types import FinishReason, Group, Prompt, Trajectory


def group(*rewards: float | None) -> Group:
    trajectories = [
        Trajectory((1,), (True,), (0,), (-1.0,), FinishReason.STOP, (), "", reward) for reward in rewards
    ]
    return Group(Prompt("a:1", (1,), "?"), tuple(trajectories))


@pytest.mark.parametrize(
    ("length", "punishment"), [(16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (20481, -1)]
)
def test_the_overlong_punishment_is_the_number_of_the_paper(length: int, punishment: float):
    shape = overlong(max_tokens=20480, cache=4096)
    assert shape(1.0, length) == pytest.approx(1.0 + punishment)
    assert unshaped(1.0, length) == 1.0


def test_a_cache_of_zero_punishes_nothing():
    assert overlong(10, 0)(1.0, 10) == 1.0


@pytest.mark.parametrize("cache", [-1, 11])
def test_a_cache_that_does_not_fit_is_refused(cache: int):
    with pytest.raises(ValueError, match=rf"overlong_cache must lie in 0..max_tokens = 10, got {cache}"):
        overlong(10, cache)


def test_dynamic_sampling_keeps_the_groups_that_disagree():
    assert keep_mixed(group(1.0, 0.0, 1.0))
    assert not keep_mixed(group(1.0, 1.0))
    assert not keep_mixed(group(0.0, None, 0.0))
    assert not keep_mixed(group(1.0))
    assert not keep_mixed(group())
    assert keep_all(group(1.0, 1.0))
