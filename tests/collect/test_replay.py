"""Replayed rollouts: how stale they may be, which ones are replayed, and what a checkpoint keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.collect.collector import Collected, Pending
from rlhf.collect.replay import Replay
from rlhf.collect.sampler import Hooks
from rlhf.config.data import ReplayConfig
from rlhf.data.prompts import PromptDataset
from rlhf.types import Group, VersionSpan
from tests.support import ALONE, group, trajectory


class Rollouts:
    """Two groups a step, sampled by the policy of that step, but the first token `late` versions older."""

    def __init__(self, late: int = 0) -> None:
        self.late = late

    def begin(self, position: int, hooks: Hooks) -> Pending:
        groups = [self.group(2 * hooks.step + i, hooks.step) for i in range(2)]
        return Pending(collected=Collected(groups, groups, position + 2, {}))

    def group(self, number: int, step: int) -> Group:
        spans = (VersionSpan(step - self.late, 0, 1), VersionSpan(step, 1, 3))
        one = trajectory([5, 6, number % 90], 0.5, versions=spans)
        return Group(
            group(f"p{number % 4}", [3, 4], [], []).prompt, (one, trajectory([7], None, versions=spans))
        )


def replay(groups: int = 3, max_age: int = 2, late: int = 0) -> Replay:
    prompts = tuple(group(f"p{i}", [3, 4], [], []).prompt for i in range(4))
    data = PromptDataset(prompts, (), 0, Path())
    section = ReplayConfig(groups_per_step=groups, max_age=max_age)
    return Replay(Rollouts(late), section, data, 0, ALONE)


def step(source: Replay, number: int) -> Collected:
    return source.begin(2 * number, Hooks(number, print, lambda: None)).settle()


def test_groups_of_earlier_steps_come_back_until_they_are_too_old():
    source = replay()
    collected = [step(source, i) for i in range(8)]
    assert [len(c.groups) for c in collected] == [2, 4, 5, 5, 5, 5, 5, 5]
    for number, those in enumerate(collected):
        again = those.groups[2:]
        ages = [number - t.versions[0].version for g in again for t in g.trajectories]
        assert all(1 <= age <= 2 for age in ages)
        assert those.metrics["replay/age_max"].value == max(ages, default=0)
        assert len({g.trajectories[0].token_ids for g in again}) == len(again)
        # metrics and counts of the step concern its own rollouts only
        assert those.sampled == those.groups[:2]
        assert those.position == 2 * number + 2


def test_the_age_is_that_of_the_oldest_token():
    # sampled across a weight update: the oldest token is one update older than the step
    source = replay(max_age=2, late=1)
    assert [len(step(source, i).groups) for i in range(6)] == [2, 4, 4, 4, 4, 4]


def test_a_step_that_is_repeated_replays_the_same():
    source = replay()
    for i in range(3):
        step(source, i)
    first, second = step(source, 3), step(source, 3)
    assert first.groups == second.groups
    # and stores its own groups once
    assert len([s for s, _ in source.stored if s == 3]) == 2


@pytest.mark.parametrize("after", [1, 4])
def test_a_checkpoint_has_all_that_is_kept(after: int):
    source, other = replay(), replay()
    for i in range(after):
        step(source, i)
    saved = json.loads(json.dumps(source.state()))
    assert saved == source.state()
    other.load(saved, {})
    assert step(other, after).groups == step(source, after).groups
