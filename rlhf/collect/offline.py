"""Groups from data in place of rollouts, beside them, or before them. Each is collected like a rollout's.

What a step draws is a pure function of seed and position, as it is for prompts. Differences from A-LoL's code
(arXiv:2305.14718): 1. the number of steps stays as set, it is not multiplied by the share of completions that
are kept; 2. completions of one prompt that are drawn in the same step share its forward pass.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.collect.collector import Collected, Pending
from rlhf.collect.sampler import Hooks, length_metrics
from rlhf.data.completions import OfflineDataset
from rlhf.data.order import order
from rlhf.distributed.world import World
from rlhf.learn.experience import ExperienceBuilder
from rlhf.metrics import Mean, Sum
from rlhf.rewards.scoring import Rewards, reward_metrics
from rlhf.types import Completion, Group, Prompt, Trajectory

Sampling = Literal["groups", "completions", "positive", "priority"]


@runtime_checkable
class Collects(Protocol):
    """Where the groups of a step come from."""

    def begin(self, position: int, hooks: Hooks) -> Pending: ...


@dataclass(frozen=True, slots=True)
class Draws:
    """How a run goes through its data."""

    sampling: Sampling
    """`groups`: prompts in turn, each with all its completions. `completions`: these one by one, `positive`:
    only those whose advantage is above 0, `priority`: those, drawn with replacement by their advantage."""
    per_step: int
    """Of groups or of completions, over all ranks."""
    seed: int


class OfflineCollector:
    """Draws from `data`; `experience` says what its completions weigh."""

    def __init__(self, data: OfflineData, draws: Draws, experience: ExperienceBuilder, world: World) -> None:
        self.data, self.draws, self.experience, self.world = data, draws, experience, world

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """`position`: how many groups or completions the run has drawn so far, over all ranks."""
        hooks.between()
        drawn = self._draw(position, self.draws.per_step)[self.world.rank :: self.world.size]
        metrics = reward_metrics(drawn) | length_metrics(drawn) | {"rollout/groups": Sum(float(len(drawn)))}
        metrics["offline/kept_fraction"] = Mean(
            float(self.num_eligible), float(self.data.dataset.num_completions)
        )
        return Pending(collected=Collected(drawn, drawn, position + self.draws.per_step, metrics))

    @cached_property
    def _rows(self) -> list[tuple[int, Trajectory, float]]:
        """Group, trajectory and weight of all that may be drawn one by one."""
        groups = self.data.groups
        rows = [(i, t) for i, g in enumerate(groups) for t in g.trajectories]
        if self.draws.sampling in ("groups", "completions"):
            return [(i, t, 1.0) for i, t in rows if t.reward is not None]
        weights = self.experience.weights(groups)
        eligible = [(i, t, w) for (i, t), w in zip(rows, weights, strict=True) if w > 0]
        if not eligible:
            raise ValueError(
                f"{self.data.dataset.source}: no completion has an advantage above 0, so data.sampling: "
                f"{self.draws.sampling} has nothing to draw; look at the rewards, or at the prompts' values"
            )
        return eligible

    @cached_property
    def _ends(self) -> list[float]:
        return list(accumulate(weight for _, _, weight in self._rows))

    @property
    def num_eligible(self) -> int:
        """Completions that may be drawn."""
        return len(self._rows)

    def _draw(self, first: int, count: int) -> list[Group]:
        sampling, seed = self.draws.sampling, self.draws.seed
        if sampling == "groups":
            chosen = order(seed, len(self.data.groups), first, count)
            return [replace(self.data.groups[g], draw=first + i) for i, g in enumerate(chosen)]
        if sampling == "priority":
            chosen = [self._by_weight(position) for position in range(first, first + count)]
        else:
            chosen = order(seed, len(self._rows), first, count)
        by_prompt: dict[int, Group] = {}
        for draw, row in enumerate(chosen, first):
            number, trajectory, _ = self._rows[row]
            group = by_prompt.get(number) or Group(self.data.groups[number].prompt, (), draw)
            by_prompt[number] = replace(group, trajectories=(*group.trajectories, trajectory))
        return list(by_prompt.values())

    def _by_weight(self, position: int) -> int:
        """Row `i` with probability weight_i / sum, by the uniform number of this draw."""
        # the raw stream of a bit generator never changes, by numpy's promise
        raw = np.random.Philox(np.random.SeedSequence([self.draws.seed, position])).random_raw()
        place = int(raw) / 2**64 * self._ends[-1]
        return min(bisect_right(self._ends, place), len(self._ends) - 1)


@dataclass(frozen=True, slots=True)
class InTurn:
    """From data for the first steps, then from rollouts."""

    first: Collects
    then: Collects
    steps: int

    def begin(self, position: int, hooks: Hooks) -> Pending:
        source = self.first if hooks.step < self.steps else self.then
        return source.begin(position, hooks)


class Mixed:
    """Rollouts, and beside those of each prompt the completions that the data has of it.

    What is measured of the step (rewards, lengths, budgets) is of the rollouts alone.
    """

    def __init__(self, rollouts: Collects, data: OfflineData) -> None:
        self.rollouts, self.data = rollouts, data

    @cached_property
    def _known(self) -> dict[str, tuple[Trajectory, ...]]:
        return {g.prompt.id: g.trajectories for g in self.data.groups}

    def begin(self, position: int, hooks: Hooks) -> Pending:
        pending = self.rollouts.begin(position, hooks)

        def wait() -> Collected:
            collected = pending.settle()
            return replace(collected, groups=[self._join(g) for g in collected.groups])

        return Pending(wait)

    def _join(self, group: Group) -> Group:
        return replace(group, trajectories=group.trajectories + self._known[group.prompt.id])


Score = tuple[float | None, Mapping[str, float]]
"""Reward and objectives of a completion."""


class OfflineData(Stateful):
    """The completions a run learns from: `groups`, scored once, before the first step.

    `rewards` None: the dataset has them. Otherwise the functions give them, and a checkpoint keeps what they
    gave, because not every function says the same twice.
    """

    def __init__(self, dataset: OfflineDataset, rewards: Rewards | None, world: World) -> None:
        self.dataset, self.rewards, self.world = dataset, rewards, world
        self.groups = dataset.groups
        self._scored = rewards is None

    def prepare(self) -> str:
        """Scores them unless they are, a share a rank, and says what there is. Raises RewardError."""
        rewards = self.rewards
        if rewards is not None and not self._scored:
            mine = self.groups[self.world.rank :: self.world.size]
            scored, _ = rewards.score(
                [g.prompt for g in mine],
                [[_completion(g.prompt, i, t) for i, t in enumerate(g.trajectories)] for g in mine],
                [[t.text for t in g.trajectories] for g in mine],
                trainer_state={"global_step": 0},
            )
            parts = self.world.gather([_scores(g) for g in scored])
            turn = [parts[i % self.world.size][i // self.world.size] for i in range(len(self.groups))]
            self._take(turn)
        given = [reward for g in self.groups for reward in g.rewards]
        mean = f"{math.fsum(given) / len(given):.3f}" if given else "unknown"
        return (
            f"data: {self.dataset.num_completions} completions of {len(self.groups)} prompts, {len(given)} "
            f"with a reward, mean {mean}"
        )

    def _take(self, scores: Sequence[Sequence[Score]]) -> None:
        self._scored = True
        self.groups = tuple(
            replace(
                g,
                trajectories=tuple(
                    replace(t, reward=reward, objectives=dict(objectives))
                    for t, (reward, objectives) in zip(g.trajectories, those, strict=True)
                ),
            )
            for g, those in zip(self.groups, scores, strict=True)
        )

    def state(self) -> dict[str, Any]:
        if self.rewards is None or not self._scored:
            return {}
        return {"scores": [[list(score) for score in _scores(g)] for g in self.groups]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        if "scores" in state:
            self._take([[tuple(score) for score in those] for those in state["scores"]])


def _scores(group: Group) -> list[Score]:
    return [(t.reward, dict(t.objectives)) for t in group.trajectories]


def _completion(prompt: Prompt, index: int, trajectory: Trajectory) -> Completion:
    return Completion(prompt.id, index, trajectory.token_ids, None, trajectory.finish_reason, versions=())
