"""What a preference loss learns from: the contrasts of a step's groups, and the constants in their margins.

A group comes here with the pairs that the pairing rule has chosen (`Group.duels`); a group of one completion
has a single label, its reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.algos.preference.forms import Row, stack
from rlhf.algos.preference.losses import ComparedGroup, Preference
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.value import RunningMoments
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.distributed.world import World
from rlhf.tensors.contrasts import Contrasts
from rlhf.types import Group


def comparisons_of(group: Group) -> list[Comparison]:
    """The comparisons of a group that has been paired, by its trajectories' places in it."""
    if len(group.trajectories) == 1:
        [reward] = group.rewards
        return [Comparison(0, None, reward)]
    return [Comparison(d.first, d.second, d.probability) for d in group.duels]


def compared_group(group: Group, comparisons: Sequence[Comparison]) -> ComparedGroup:
    """What a preference loss sees of a group with these comparisons."""
    tokens = [sum(t.loss_mask) for t in group.trajectories]
    return ComparedGroup(comparisons, tokens, [t.source for t in group.trajectories])


def contrasts_of(groups: Sequence[Group], preference: Preference) -> tuple[Contrasts, Tensor | None]:
    """The contrasts of all comparisons, and the pull `[S]` on each sequence's log-prob, if there is any.

    Sequences are numbered as `pack_groups` packs the trajectories of `groups`.
    """
    rows: list[Row] = []
    pulls: list[float] = []
    for group in groups:
        pulled = compared_group(group, comparisons_of(group))
        rows += [row.shifted(len(pulls)) for row in preference.rows(pulled)]
        pulls += preference.pulls(pulled)
    return stack(rows), None if preference.pull is None else torch.tensor(pulls)


def with_offset(contrasts: Contrasts, offset: float) -> Contrasts:
    """The contrasts with `offset` subtracted from each margin."""
    return replace(contrasts, offset=torch.full_like(contrasts.offset, offset))


def under_other_prompts(groups: Sequence[Group], numbers: Sequence[int], world: World) -> list[Group]:
    """Each group's prompt with the trajectories of the next group of the step, over all ranks (KTO's z0).

    `numbers`: the number of each group among those of all ranks; the last one gets those of the first. A step
    of a single group has no other prompt: there is nothing to compare with, and the list is empty.
    """
    parts = world.gather([(n, g.trajectories) for n, g in zip(numbers, groups, strict=True)])
    trajectories = dict(pair for part in parts for pair in part)
    order = sorted(trajectories)
    if len(order) < 2:
        return []
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [replace(g, trajectories=trajectories[following[n]]) for n, g in zip(numbers, groups, strict=True)]


class RunningReward(Stateful):
    """The mean implied reward of all completions of the run so far, this step's included (BCO)."""

    def __init__(self, world: World) -> None:
        self.world, self.moments = world, RunningMoments()

    def __call__(self, rewards: Tensor) -> float:
        """`rewards` `[S]`: the implied rewards of this rank's completions. Every rank calls it."""
        self.moments = self.moments.update(rewards, all_sum=self.world.all_sum)
        return self.moments.mean

    def state(self) -> dict[str, Any]:
        return asdict(self.moments)

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.moments = RunningMoments(**state)
