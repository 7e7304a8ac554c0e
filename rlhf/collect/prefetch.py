"""Prefetches the next step's batch: samples it before an update, and scores it during the update.

With `rollout.ahead` = 1, a step learns from a batch that the policy sampled one version earlier:

    sample k+1 | update k, rewards of k+1 in their workers | sync | wait for these rewards | sample k+2 | ...

Each token carries the policy_version that sampled it. The weight min(pi_old / pi_engine, C) of
`algorithm.mismatch` corrects for the update in between, and tokens with a staleness above `rollout.ahead` are
taken out of the loss (`rlhf/collect/staleness.py`). The batch is saved in checkpoints, because it could not
be sampled again: the weights that sampled it are gone by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.checkpoints.serialization import group_of, group_state, metrics_from, metrics_state
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.collect.collector import Collected, Pending
from rlhf.collect.staleness import mask_stale_tokens
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.metrics import Metrics, merge
from rlhf.types import Group


class Prefetch(Stateful):
    """Keeps the batch of the next step if `steps` is 1; does nothing if it is 0."""

    def __init__(self, prompts: PromptDataset, world: World, steps: int) -> None:
        self.world, self.steps, self._prompts = world, steps, prompts
        self._pending: Pending | None = None
        self._batches: list[dict[str, Any]] = []
        """The settled batch of each rank, in the form of a checkpoint; empty until `settle`."""

    def current(self, begin: Callable[[], Pending]) -> Collected:
        """The batch of this step: the prefetched one or, without it, one that is sampled now by `begin`."""
        return (self._pending or begin()).settle()

    def next(self, pending: Pending | None) -> None:
        """Keeps `pending` for the next step, in place of the batch of this step, which has been used."""
        self._pending, self._batches = pending, []

    def settle(self) -> None:
        """Waits for rewards and gathers the batches of all ranks for a checkpoint. Every rank calls it."""
        if self._pending is not None:
            self._batches = self.world.gather(_batch_state(self._pending.settle()))

    def mask_stale_tokens(self, groups: Sequence[Group], version: int) -> tuple[Sequence[Group], Metrics]:
        """The groups with tokens staler than `steps` masked, and metrics; unchanged without prefetching."""
        if not self.steps:
            return groups, {}
        return mask_stale_tokens(groups, version=version, bound=self.steps)

    def state(self) -> dict[str, Any]:
        if self._pending is None:
            return {"ranks": []}
        # before `settle` (a stop within an update) only this batch is known: a run of one rank has no others
        return {"ranks": self._batches or [_batch_state(self._pending.settle())]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self._pending, self._batches = None, list(state["ranks"])
        if not self._batches:
            return
        if len(self._batches) != self.world.size:
            self._batches = _deal(self._batches, self.world.size)
        mine = self._batches[self.world.rank]
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
        # groups to which completions of the data were added: they are not among the sampled ones
        "joined": [group_state(g) for g in collected.groups if id(g) not in sampled],
        "position": collected.position,
        "metrics": metrics_state(collected.metrics),
    }


def _deal(ranks: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The same groups dealt to `size` ranks; the metrics of all go to the first."""
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
