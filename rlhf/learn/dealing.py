"""Which rank and which minibatch a group belongs to: about as many tokens on each rank.

Completions differ in length: if ranks learned from what they sampled, all would wait for the rank with the
most tokens. So once a step every group is given to a rank, minibatch by minibatch: the group with the most
tokens first, each to the rank with the fewest so far (R. L. Graham, "Bounds on multiprocessing timing
anomalies", 1969). No rank then has more than the mean plus the largest group, nor more than 4/3 of the
maximum in the best assignment.

Which groups make up a minibatch does not depend on the ranks: they are numbered in the order in which their
prompts were drawn, and the numbers are shuffled. So any number of ranks makes the same updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.config.learner import LearnerConfig
from rlhf.distributed.world import World, derive_seed
from rlhf.torch_typed import integers
from rlhf.types import Group


def minibatch_of(total: int, minibatches: int, *, seed: int, step: int, epoch: int) -> list[int]:
    """The minibatch, `0 .. minibatches - 1`, of each of the `total` groups of a step in one epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches", step, epoch))
    found = [0] * total
    for place, number in enumerate(integers(torch.randperm(total, generator=generator))):
        found[number] = place % minibatches
    return found


def cost_of(group: Group) -> int:
    """Tokens of a group, its prompt counted once."""
    return len(group.prompt.token_ids) + sum(len(t.token_ids) for t in group.trajectories)


def assign(costs: Sequence[int], homes: Sequence[int], minibatches: Sequence[int], ranks: int) -> list[int]:
    """A rank for each group, from the group's cost, the rank that has it (`homes`) and its minibatch.

    Of ranks with equally few tokens in the minibatch, the one with the fewest in the whole step is taken,
    then the rank that has the group, then the first.
    """
    assigned = [0] * len(costs)
    in_step = [0] * ranks
    for minibatch in sorted(set(minibatches)):
        in_minibatch = [0] * ranks
        members = [i for i, m in enumerate(minibatches) if m == minibatch]
        for i in sorted(members, key=lambda i: -costs[i]):
            rank = min(range(ranks), key=lambda r: (in_minibatch[r], in_step[r], r != homes[i], r))
            assigned[i] = rank
            in_minibatch[rank] += costs[i]
            in_step[rank] += costs[i]
    return assigned


def deal(
    groups: Sequence[Group], world: World, section: LearnerConfig, *, seed: int, step: int
) -> tuple[Sequence[Group], list[int]]:
    """The groups that this rank learns from, and their numbers among those of all ranks.

    Every rank calls it; only groups that move to another rank are sent.
    """
    costs_of_ranks = world.gather([(group.draw, cost_of(group)) for group in groups])
    # in the order in which their prompts were drawn: a group's place here is its number
    numbered = sorted((draw, cost, rank) for rank, own in enumerate(costs_of_ranks) for draw, cost in own)
    number = {draw: i for i, (draw, _, _) in enumerate(numbered)}
    assert len(number) == len(numbered), "two groups of one draw"
    if world.size == 1:
        return groups, [number[group.draw] for group in groups]
    minibatches = minibatch_of(len(numbered), section.minibatches, seed=seed, step=step, epoch=0)
    costs, homes = [cost for _, cost, _ in numbered], [rank for _, _, rank in numbered]
    assigned = assign(costs, homes, minibatches, world.size)
    mine = {number[group.draw]: group for group in groups}
    leaving = [(assigned[n], n, group) for n, group in mine.items() if assigned[n] != world.rank]
    arrived = [(n, g) for sent in world.gather(leaving) for rank, n, g in sent if rank == world.rank]
    staying = [(n, g) for n, g in mine.items() if assigned[n] == world.rank]
    ordered = sorted(staying + arrived, key=lambda pair: pair[0])
    return [group for _, group in ordered], [n for n, _ in ordered]
