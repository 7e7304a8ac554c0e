"""Replay buffer: learns again from rollouts of earlier steps, with the log-probs they were sampled with.

A replayed token was sampled by an older policy. The algorithm's mismatch correction, a truncated ratio of the
policy before this step to the policy that sampled (`rlhf/algos/ratio.py`), corrects for that.
`replay.max_age` bounds the staleness that has to be corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.collect.collector import Collected, Pending
from rlhf.collect.offline import GroupSource
from rlhf.collect.sampler import Hooks
from rlhf.collect.staleness import oldest_version
from rlhf.config.data import ReplayConfig
from rlhf.data.order import order
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World, derive_seed
from rlhf.metrics import Max, Mean, Sum
from rlhf.types import Group, Prompt


class Replay(Stateful):
    """Adds groups of earlier steps, with a staleness of at most `max_age` updates, to those of each step.

    Which groups are replayed depends only on seed and step. Every rank stores the groups of all ranks and
    replays its share of them.
    """

    def __init__(
        self, rollouts: GroupSource, section: ReplayConfig, prompts: PromptDataset, seed: int, world: World
    ) -> None:
        self.rollouts, self.section, self.seed, self.world = rollouts, section, seed, world
        self.prompts: dict[str, Prompt] = {p.id: p for p in prompts.prompts}
        self.stored: list[tuple[int, Group]] = []
        """Stored groups, each with the step in which it was sampled, oldest first."""

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """Groups of `rollouts` and some stored ones; all metrics but `replay/*` cover only the rollouts."""
        pending = self.rollouts.begin(position, hooks)
        return Pending(lambda: self._add(pending.settle(), hooks.step))

    def _add(self, collected: Collected, step: int) -> Collected:
        # `s < step`: an interrupted step is repeated, and must not see what it stored the first time
        self.stored = [
            (s, g) for s, g in self.stored if s < step and step - oldest_version(g) <= self.section.max_age
        ]
        wanted = min(self.section.groups_per_step, len(self.stored))
        chosen = order(derive_seed(self.seed, "replay", step), len(self.stored), 0, wanted) if wanted else []
        replayed = [self.stored[i][1] for i in chosen[self.world.rank :: self.world.size]]
        sampled = [g for part in self.world.gather(collected.groups) for g in part]
        self.stored += [(step, g) for g in sorted(sampled, key=lambda g: g.draw)]
        ages = [float(step - oldest_version(g)) for g in replayed]
        metrics = {
            "replay/groups": Sum(float(len(replayed))),
            "replay/age": Mean(sum(ages), float(len(ages))),
            "replay/age_max": Max(max(ages, default=0.0)),
        }
        return replace(collected, groups=[*collected.groups, *replayed], metrics=collected.metrics | metrics)

    def state(self) -> dict[str, Any]:
        return {"kept": [[step, group_state(group)] for step, group in self.stored]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.stored = [(step, group_of(group, self.prompts)) for step, group in state["kept"]]
