"""The groups of a step, dealt to the ranks so that each has about as many tokens to learn from.

Completions differ in length, so ranks that learn from what they sampled wait for the one with the longest.
Once a step every group is given to a rank, minibatch by minibatch: the one with the most tokens first, each
to the rank with the fewest so far (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969). No rank
has then more than the mean and the largest group, and none more than 4/3 of what the best dealing gives.

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


def minibatch_of(total: int, parts: int, *, seed: int, step: int, epoch: int) -> list[int]:
    """To which of `parts` minibatches each of the `total` groups of a step belongs, in one pass over them."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches", step, epoch))
    found = [0] * total
    for place, number in enumerate(integers(torch.randperm(total, generator=generator))):
        found[number] = place % parts
    return found


def cost_of(group: Group) -> int:
    """Tokens, the prompt once."""
    return len(group.prompt.token_ids) + sum(len(t.token_ids) for t in group.trajectories)


def assign(costs: Sequence[int], homes: Sequence[int], minibatches: Sequence[int], ranks: int) -> list[int]:
    """A rank for each group, from its cost, the rank that has it and its minibatch.

    Of ranks with equally little in the minibatch the one with the least in the whole step, then the group's
    own, then the first.
    """
    dealt = [0] * len(costs)
    in_all = [0] * ranks
    for part in sorted(set(minibatches)):
        here = [0] * ranks
        mine = [i for i, p in enumerate(minibatches) if p == part]
        for i in sorted(mine, key=lambda i: -costs[i]):
            rank = min(range(ranks), key=lambda r: (here[r], in_all[r], r != homes[i], r))
            dealt[i] = rank
            here[rank] += costs[i]
            in_all[rank] += costs[i]
    return dealt


def deal(
    groups: Sequence[Group], world: World, section: LearnerConfig, *, seed: int, step: int
) -> tuple[Sequence[Group], list[int]]:
    """The groups that this rank learns from, and their numbers among those of all ranks.

    Every rank calls it; only groups that move to another rank are sent.
    """
    known = world.gather([(group.draw, cost_of(group)) for group in groups])
    every = sorted((draw, cost, rank) for rank, own in enumerate(known) for draw, cost in own)
    number = {draw: i for i, (draw, _, _) in enumerate(every)}
    assert len(number) == len(every), "two groups of one draw"
    if world.size == 1:
        return groups, [number[group.draw] for group in groups]
    minibatches = minibatch_of(len(every), section.minibatches, seed=seed, step=step, epoch=0)
    dealt = assign([c for _, c, _ in every], [rank for _, _, rank in every], minibatches, world.size)
    mine = {number[group.draw]: group for group in groups}
    leaving = [(dealt[n], n, group) for n, group in mine.items() if dealt[n] != world.rank]
    arrived = [(n, g) for sent in world.gather(leaving) for rank, n, g in sent if rank == world.rank]
    kept = [(n, g) for n, g in mine.items() if dealt[n] == world.rank]
    ordered = sorted(kept + arrived, key=lambda pair: pair[0])
    return [group for _, group in ordered], [n for n, _ in ordered]
