"""Rollouts kept for more than one step: learned from again, with the log-probs they were sampled with.

A replayed token was sampled by an older policy. The algorithm's mismatch correction, a truncated ratio of the
policy before this step to the one that sampled (`rlhf.algos.ratio`), is what makes it count right; age bounds
how far it has to reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf.checkpoints.plain import group_of, group_state
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.collect.collector import Collected, Pending
from rlhf.collect.offline import Collects
from rlhf.collect.sampler import Hooks
from rlhf.config.data import ReplayConfig
from rlhf.data.order import order
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World, derive_seed
from rlhf.metrics import Max, Mean, Sum
from rlhf.types import Group, Prompt


class Replay(Stateful):
    """Adds groups of earlier steps, at most `max_age` updates old, to those of each step.

    Which ones depends on seed and step alone. Every rank keeps those of all, and replays its share.
    """

    def __init__(
        self, rollouts: Collects, section: ReplayConfig, prompts: PromptDataset, seed: int, world: World
    ) -> None:
        self.rollouts, self.section, self.seed, self.world = rollouts, section, seed, world
        self.prompts: dict[str, Prompt] = {p.id: p for p in prompts.prompts}
        self.stored: list[tuple[int, Group]] = []
        """Each with the step it was sampled in, oldest first."""

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """The groups of `rollouts` and some of those stored; what is measured of the step is of the first."""
        pending = self.rollouts.begin(position, hooks)
        return Pending(lambda: self._add(pending.settle(), hooks.step))

    def _add(self, collected: Collected, step: int) -> Collected:
        # a step that was given up is repeated: what it left here is not there the second time
        self.stored = [
            (s, g) for s, g in self.stored if s < step and step - oldest_version(g) <= self.section.max_age
        ]
        wanted = min(self.section.groups_per_step, len(self.stored))
        chosen = order(derive_seed(self.seed, "replay", step), len(self.stored), 0, wanted) if wanted else []
        again = [self.stored[i][1] for i in chosen[self.world.rank :: self.world.size]]
        sampled = [g for part in self.world.gather(collected.groups) for g in part]
        self.stored += [(step, g) for g in sorted(sampled, key=lambda g: g.draw)]
        ages = [float(step - oldest_version(g)) for g in again]
        metrics = {
            "replay/groups": Sum(float(len(again))),
            "replay/age": Mean(sum(ages), float(len(ages))),
            "replay/age_max": Max(max(ages, default=0.0)),
        }
        return replace(collected, groups=[*collected.groups, *again], metrics=collected.metrics | metrics)

    def state(self) -> dict[str, Any]:
        return {"kept": [[step, group_state(group)] for step, group in self.stored]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.stored = [(step, group_of(group, self.prompts)) for step, group in state["kept"]]


def oldest_version(group: Group) -> int:
    """The policy that sampled its oldest token."""
    return min(span.version for t in group.trajectories for span in t.versions)
