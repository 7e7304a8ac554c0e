"""Staleness of tokens: which tokens are taken out of the loss, and the oldest policy_version of a group."""

from __future__ import annotations

import pytest

from rlhf.collect.staleness import mask_stale_tokens, oldest_version
from rlhf.metrics import Mean
from rlhf.types import Group, Prompt, VersionSpan
from tests.support import trajectory

SPANS = (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3), VersionSpan(5, 3, 5))


def sampled_by_three_versions() -> Group:
    return Group(Prompt("p", (1,), "p"), (trajectory([7, 7, 7, 7, 7], 1.0, versions=SPANS),))


@pytest.mark.parametrize(
    ("bound", "mask"), [(0, [0, 0, 0, 1, 1]), (1, [0, 0, 1, 1, 1]), (2, [1, 1, 1, 1, 1])]
)
def test_tokens_older_than_the_bound_are_taken_out_of_the_loss(bound: int, mask: list[int]) -> None:
    (result,), metrics = mask_stale_tokens([sampled_by_three_versions()], version=5, bound=bound)
    assert result.trajectories[0].loss_mask == tuple(map(bool, mask))
    assert metrics["staleness/mean"].value == pytest.approx((2 + 2 + 1 + 0 + 0) / 5)
    assert metrics["staleness/max"].value == 2
    assert metrics["staleness/dropped"].value == pytest.approx(1 - sum(mask) / 5)


def test_tokens_of_a_tool_do_not_count_in_the_metrics() -> None:
    tool = trajectory([7, 8, 9], 1.0, loss_mask=(True, False, True), versions=(VersionSpan(0, 0, 3),))
    (result,), metrics = mask_stale_tokens([Group(Prompt("p", (1,), "p"), (tool,))], version=1, bound=1)
    assert result.trajectories[0].loss_mask == (True, False, True)
    assert metrics["staleness/mean"] == Mean(2.0, 2)


def test_every_turn_has_the_versions_that_sampled_it_though_a_tool_spoke_in_between() -> None:
    # a a | t t t | b b: the second turn was sampled by later weights, its last token by later ones still
    mask = (True, True, False, False, False, True, True)
    spans = (VersionSpan(3, 0, 2), VersionSpan(4, 5, 6), VersionSpan(5, 6, 7))
    episode = trajectory([7] * 7, 1.0, loss_mask=mask, turns=(0,) * 5 + (1, 1), versions=spans)
    (result,), metrics = mask_stale_tokens([Group(Prompt("p", (1,), "p"), (episode,))], version=5, bound=1)
    assert result.trajectories[0].loss_mask == (False,) * 5 + (True, True)
    # 5 - 3 twice, 5 - 4 and 5 - 5, over the four tokens that the policy chose
    assert metrics["staleness/mean"] == Mean(2.0 + 2.0 + 1.0 + 0.0, 4)


def test_the_oldest_version_is_that_of_the_most_stale_token() -> None:
    assert oldest_version(sampled_by_three_versions()) == 3
