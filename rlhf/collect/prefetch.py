"""The batch after the one that is learned from: sampled before the update, scored while it is made.

With `rollout.ahead` = 1, a step learns from a batch that the policy sampled one version earlier:

    sample k+1 | update k, rewards of k+1 in their workers | sync | wait for these rewards | sample k+2 | ...

Each token knows the version it is from; the weight min(pi_old / pi_engine, C) of `algorithm.mismatch`
corrects for the step between, and tokens older than the bound are taken out of the loss. The batch is part
of a checkpoint: the weights it was sampled with are gone by then, so it could not be sampled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.checkpoints.plain import group_of, group_state, metrics_from, metrics_state
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.collect.collector import Collected, Pending
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.metrics import Max, Mean, Metrics, merge
from rlhf.types import Group, Trajectory


class Prefetch(Stateful):
    """The next step's batch, when `steps` is 1; when it is 0 there is none, and this has nothing to do."""

    def __init__(self, prompts: PromptDataset, world: World, steps: int) -> None:
        self.world, self.steps, self._prompts = world, steps, prompts
        self._pending: Pending | None = None
        self._everyones: list[dict[str, Any]] = []
        """The settled batch of each rank, as a checkpoint holds it."""

    def current(self, begin: Callable[[], Pending]) -> Collected:
        """The batch of this step: the one that waits, or if there is none one that is sampled now."""
        return (self._pending or begin()).settle()

    def next(self, pending: Pending | None) -> None:
        """Takes the place of the batch of this step, which has been used."""
        self._pending, self._everyones = pending, []

    def settle(self) -> None:
        """Waits for the rewards; every rank then knows the batch of every other, for the checkpoint."""
        if self._pending is not None:
            self._everyones = self.world.gather(_batch_state(self._pending.settle()))

    def fresh(self, groups: Sequence[Group], version: int) -> tuple[Sequence[Group], Metrics]:
        """The groups with tokens that are too old out of the loss."""
        return fresh(groups, version=version, bound=self.steps) if self.steps else (groups, {})

    def state(self) -> dict[str, Any]:
        if self._pending is None:
            return {"ranks": []}
        # not known of others when stopped within an update, which only a rank that is alone may be
        return {"ranks": self._everyones or [_batch_state(self._pending.settle())]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self._pending, self._everyones = None, list(state["ranks"])
        if not self._everyones:
            return
        if len(self._everyones) != self.world.size:
            self._everyones = _dealt(self._everyones, self.world.size)
        mine = self._everyones[self.world.rank]
        prompts = {p.id: p for p in self._prompts.prompts}
        sampled = [group_of(g, prompts) for g in mine["groups"]]
        accepted = [group for group, plain in zip(sampled, mine["groups"], strict=True) if plain["kept"]]
        accepted += [group_of(g, prompts) for g in mine.get("joined", ())]
        collected = Collected(accepted, sampled, mine["position"], metrics_from(mine["metrics"]))
        self._pending = Pending(collected=collected)


def _batch_state(collected: Collected) -> dict[str, Any]:
    accepted, sampled = ({id(group) for group in groups} for groups in (collected.groups, collected.sampled))
    return {
        "groups": [group_state(g) | {"kept": id(g) in accepted} for g in collected.sampled],
        # with completions of the data beside those that were sampled
        "joined": [group_state(g) for g in collected.groups if id(g) not in sampled],
        "position": collected.position,
        "metrics": metrics_state(collected.metrics),
    }


def _dealt(ranks: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The same groups over another number of ranks; what was measured goes to the first."""
    groups, joined = ([g for part in ranks for g in part.get(name, ())] for name in ("groups", "joined"))
    metrics = [metrics_state(merge([metrics_from(part["metrics"]) for part in ranks])), *[{}] * (size - 1)]
    return [
        {
            "groups": groups[rank::size],
            "joined": joined[rank::size],
            "position": ranks[0]["position"],
            "metrics": metrics[rank],
        }
        for rank in range(size)
    ]


def fresh(groups: Sequence[Group], *, version: int, bound: int) -> tuple[list[Group], Metrics]:
    """The groups with tokens of more than `bound` updates ago out of the loss, and how old the tokens are."""
    ages: list[int] = []
    result: list[Group] = []
    for group in groups:
        trajectories: list[Trajectory] = []
        for t in group.trajectories:
            own = [version - v.version for v in t.versions for _ in range(v.start, v.end)]
            # tokens of a later turn than the last span belong to it; those of data have no age
            own += (own[-1:] or [0]) * (len(t.token_ids) - len(own))
            ages += [age for age, chosen in zip(own, t.loss_mask, strict=True) if chosen and t.versions]
            mask = tuple(m and age <= bound for m, age in zip(t.loss_mask, own, strict=True))
            trajectories.append(t if mask == t.loss_mask else replace(t, loss_mask=mask))
        result.append(replace(group, trajectories=tuple(trajectories)))
    dropped = float(sum(age > bound for age in ages))
    return result, {
        "staleness/mean": Mean(float(sum(ages)), float(len(ages))),
        "staleness/max": Max(float(max(ages, default=0))),
        "staleness/dropped": Mean(dropped, float(len(ages))),
    }
