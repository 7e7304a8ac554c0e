"""Groups dealt to ranks: every one once, about as many tokens everywhere, the same updates on any number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.learner import LearnerConfig
from rlhf.distributed.world import world
from rlhf.learn.dealing import assign, cost_of, deal, minibatch_of
from rlhf.types import Group
from tests.faults.processes import launch
from tests.ranks import together
from tests.support import ALONE, bandit_settings, metrics_of, random_groups

COSTS = st.lists(st.integers(1, 4000), min_size=1, max_size=40)


@settings(deadline=None)
@given(costs=COSTS, ranks=st.integers(1, 8), parts=st.integers(1, 4), seed=st.integers(0, 9))
def test_no_rank_has_more_than_the_mean_and_the_largest_group(
    costs: list[int], ranks: int, parts: int, seed: int
) -> None:
    minibatches = minibatch_of(len(costs), parts, seed=seed, step=1, epoch=0)
    homes = [i * ranks // len(costs) for i in range(len(costs))]
    dealt = assign(costs, homes, minibatches, ranks)
    assert dealt == assign(costs, homes, minibatches, ranks) and set(dealt) <= set(range(ranks))
    for part in set(minibatches):
        here = [i for i, p in enumerate(minibatches) if p == part]
        load = [sum(costs[i] for i in here if dealt[i] == rank) for rank in range(ranks)]
        mean, largest = sum(load) / ranks, max(costs[i] for i in here)
        assert max(load) <= mean + largest * (1 - 1 / ranks) + 1e-9


def test_by_hand() -> None:
    # 9 to the first rank, 7 and 5 to the second, 4 to the first
    assert assign([4, 9, 5, 7], [0, 0, 1, 1], [0, 0, 0, 0], 2) == [0, 0, 1, 1]
    # in the second minibatch the rank with less in the first begins
    assert assign([10, 2, 6], [0, 0, 0], [0, 0, 1], 2) == [0, 1, 1]
    # equal ones stay where they are
    assert assign([5, 5], [1, 0], [0, 0], 2) == [1, 0]


def test_skewed_lengths_are_evened_out() -> None:
    """Lengths as of reasoning: a few long ones, which happen to lie on one rank."""
    costs = [3000] * 4 + [2000] * 4 + [300] * 24
    homes = [i // 8 for i in range(32)]
    dealt = assign(costs, homes, [0] * 32, 4)
    mean = sum(costs) / 4

    def most(ranks: list[int]) -> float:
        return max(sum(c for c, r in zip(costs, ranks, strict=True) if r == k) for k in range(4)) / mean

    assert most(homes) == pytest.approx(20000 / 6800) and most(dealt) == 1.0


def test_a_minibatch_is_a_share_of_a_shuffle() -> None:
    found = minibatch_of(10, 3, seed=0, step=4, epoch=1)
    assert sorted(found.count(part) for part in range(3)) == [3, 3, 4]
    assert found != minibatch_of(10, 3, seed=0, step=4, epoch=0)
    assert found == minibatch_of(10, 3, seed=0, step=4, epoch=1)


def drawn(groups: list[Group], first: int) -> list[Group]:
    return [replace(group, draw=first + i) for i, group in enumerate(groups)]


def test_alone_nothing_moves() -> None:
    a, b, c = random_groups(0, sizes=[3, 1, 2])
    groups = [replace(a, draw=7), replace(b, draw=9), replace(c, draw=8)]
    assert deal(groups, ALONE, LearnerConfig(minibatches=2), seed=0, step=0) == (groups, [0, 2, 1])


def every_group_arrives_once() -> None:
    with world() as here:
        sizes = [[9, 8], [1], [1, 1], [1]][here.rank]
        groups = drawn(random_groups(here.rank, sizes=sizes), [0, 2, 3, 5][here.rank])
        got, numbers = deal(groups, here, LearnerConfig(), seed=0, step=0)
        before = here.gather(groups)
        after = here.gather(list(zip(numbers, got, strict=True)))
        flat = dict(pair for part in after for pair in part)
        assert [flat[n] for n in range(6)] == [g for part in before for g in part]
        most = max(sum(cost_of(g) for _, g in part) for part in after)
        assert most < max(sum(map(cost_of, part)) for part in before)


@pytest.mark.multi
def test_groups_move_between_ranks() -> None:
    together(4, every_group_arrives_once)


@pytest.mark.multi
def test_two_ranks_make_the_updates_of_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Several updates a step, each from the same prompts whoever sampled them."""
    records: list[list[dict[str, Any]]] = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        changes = {"minibatches": 2, "epochs": 2, "lr": 1e-3}
        run = bandit_settings(folder, tiny_model_dir, steps=3, learner=changes)
        for ended in launch(run, folder / "log", ranks=ranks, deadline=180):
            assert ended.code == 0, ended.said
        records.append(metrics_of(folder))
    for one, two in zip(*records, strict=True):
        for name in ("loss/policy", "grad_norm", "clip_fraction", "entropy", "reward/mean"):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name
