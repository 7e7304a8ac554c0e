"""Groups from a dataset of completions (offline data): instead of rollouts, beside them, or before them.

What a step draws is a function of seed and position, as for prompts. Differences from the code of A-LoL
(arXiv:2305.14718): 1. the number of steps is the setting, not multiplied by the share of eligible
completions; 2. completions of one prompt that are drawn in the same step share the forward pass of the
prompt.
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
from rlhf.rewards.measures import reward_metrics
from rlhf.rewards.scoring import Rewards
from rlhf.types import Completion, Group, Prompt, Source, Trajectory

Sampling = Literal["groups", "completions", "positive", "priority"]


@runtime_checkable
class GroupSource(Protocol):
    """A source of the groups of a step: rollouts, data, replay, or a combination."""

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """Samples or draws the groups of the step from `position` on; rewards may follow later."""
        ...


@dataclass(frozen=True, slots=True)
class Draws:
    """How a step draws from the data."""

    sampling: Sampling
    """`groups`: prompts in shuffled order, each with all its completions. `completions`: single completions
    in shuffled order. `positive`: the same, but only completions whose advantage is above 0. `priority`: only
    completions whose advantage is above 0, drawn with replacement in proportion to it."""
    per_step: int
    """Number of groups (or of completions) drawn in a step, over all ranks."""
    seed: int
    together: Sequence[Sequence[int]] = ()
    """The groups, by index, that a step of `groups` draws one behind another; all of one length, of which
    `per_step` is a multiple. Empty: each is drawn by itself."""


class OfflineCollector:
    """Draws the groups of a step from `data`; `experience` computes the advantages to draw by."""

    def __init__(self, data: OfflineData, draws: Draws, experience: ExperienceBuilder, world: World) -> None:
        self.data, self.draws, self.experience, self.world = data, draws, experience, world

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """`position`: number of groups or completions that the run has drawn so far, over all ranks."""
        hooks.between()
        drawn = self._draw(position, self.draws.per_step)[self.world.rank :: self.world.size]
        metrics = reward_metrics(drawn) | length_metrics(drawn) | {"rollout/groups": Sum(float(len(drawn)))}
        metrics["offline/kept_fraction"] = Mean(
            float(self.num_eligible), float(self.data.dataset.num_completions)
        )
        return Pending(collected=Collected(drawn, drawn, position + self.draws.per_step, metrics))

    @cached_property
    def _eligible(self) -> list[tuple[int, Trajectory, float]]:
        """Index of its group, trajectory and weight of each completion that may be drawn."""
        groups = self.data.groups
        rows = [(i, t) for i, g in enumerate(groups) for t in g.trajectories]
        if self.draws.sampling in ("groups", "completions"):
            return [(i, t, 1.0) for i, t in rows if t.reward is not None]
        weights = self.experience.weights(groups)
        eligible = [(i, t, w) for (i, t), w in zip(rows, weights, strict=True) if w > 0]
        if not eligible:
            raise ValueError(
                f"{self.data.dataset.source}: no completion has an advantage above 0, so data.sampling: "
                f"{self.draws.sampling} has nothing to draw; check the rewards and the values of the prompts"
            )
        return eligible

    @cached_property
    def _cumulative_weights(self) -> list[float]:
        return list(accumulate(weight for _, _, weight in self._eligible))

    @property
    def num_eligible(self) -> int:
        """Number of completions that may be drawn."""
        return len(self._eligible)

    def _draw(self, first: int, count: int) -> list[Group]:
        """Draws `first .. first + count - 1`; completions of the same prompt are joined to one group."""
        sampling, seed = self.draws.sampling, self.draws.seed
        if sampling == "groups":
            chosen = self._together(first, count)
            return [replace(self.data.groups[g], draw=first + i) for i, g in enumerate(chosen)]
        if sampling == "priority":
            chosen = [self._by_weight(position) for position in range(first, first + count)]
        else:
            chosen = order(seed, len(self._eligible), first, count)
        by_prompt: dict[int, Group] = {}
        for draw, row in enumerate(chosen, first):
            number, trajectory, _ = self._eligible[row]
            group = by_prompt.get(number) or Group(self.data.groups[number].prompt, (), draw)
            by_prompt[number] = replace(group, trajectories=(*group.trajectories, trajectory))
        return list(by_prompt.values())

    def _together(self, first: int, count: int) -> list[int]:
        """The indices of `count` groups, in shuffled order but for those that are drawn together."""
        families = self.draws.together or [[index] for index in range(len(self.data.groups))]
        size = len(families[0])
        chosen = order(self.draws.seed, len(families), first // size, count // size)
        return [index for family in chosen for index in families[family]]

    def _by_weight(self, position: int) -> int:
        """Index of an eligible completion, `i` with probability weight_i / sum of weights."""
        # NumPy guarantees that the raw stream of a bit generator never changes
        raw = np.random.Philox(np.random.SeedSequence([self.draws.seed, position])).random_raw()
        ends = self._cumulative_weights
        return min(bisect_right(ends, int(raw) / 2**64 * ends[-1]), len(ends) - 1)


@dataclass(frozen=True, slots=True)
class DataThenRollouts:
    """Groups of the first `data_steps` steps come from data, those of all later steps from rollouts."""

    data: GroupSource
    rollouts: GroupSource
    data_steps: int

    def begin(self, position: int, hooks: Hooks) -> Pending:
        source = self.data if hooks.step < self.data_steps else self.rollouts
        return source.begin(position, hooks)


class DataBesideRollouts:
    """Adds to the rollouts of each prompt the completions that the data has for it.

    The metrics of a step (rewards, lengths) and its budgets concern the rollouts alone.
    """

    def __init__(self, rollouts: GroupSource, data: OfflineData) -> None:
        self.rollouts, self.data = rollouts, data

    @cached_property
    def _by_prompt(self) -> dict[str, tuple[Trajectory, ...]]:
        return {g.prompt.id: g.trajectories for g in self.data.groups}

    def begin(self, position: int, hooks: Hooks) -> Pending:
        pending = self.rollouts.begin(position, hooks)

        def wait() -> Collected:
            collected = pending.settle()
            return replace(collected, groups=[self._join(g) for g in collected.groups])

        return Pending(wait)

    def _join(self, group: Group) -> Group:
        return replace(group, trajectories=group.trajectories + self._by_prompt[group.prompt.id])


Score = tuple[float | None, Mapping[str, float]]
"""Reward and objectives of a completion."""


class OfflineData(Stateful):
    """The completions of a dataset as scored `groups`; they are scored once, before the first step.

    If `rewards` is None, the dataset has the rewards. Otherwise reward functions compute them, and a
    checkpoint keeps the scores, because not every function returns the same score twice.
    """

    def __init__(self, dataset: OfflineDataset, rewards: Rewards | None, world: World) -> None:
        self.dataset, self.rewards, self.world = dataset, rewards, world
        self.groups = dataset.groups
        self._scored = rewards is None

    def prepare(self) -> str:
        """Scores the completions unless that is done, each rank a share; returns a summary for the log.

        Raises RewardError as `Rewards.score` does.
        """
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
            scores = [parts[i % self.world.size][i // self.world.size] for i in range(len(self.groups))]
            self._set_scores(scores)
        given = [reward for g in self.groups for reward in g.rewards]
        mean = f"{math.fsum(given) / len(given):.3f}" if given else "unknown"
        return (
            f"data: {self.dataset.num_completions} completions of {len(self.groups)} prompts, {len(given)} "
            f"with a reward, mean {mean}"
        )

    def _set_scores(self, scores: Sequence[Sequence[Score]]) -> None:
        self._scored = True
        self.groups = tuple(
            replace(
                g,
                trajectories=tuple(
                    replace(t, reward=reward, objectives=dict(objectives))
                    for t, (reward, objectives) in zip(g.trajectories, of_group, strict=True)
                ),
            )
            for g, of_group in zip(self.groups, scores, strict=True)
        )

    def state(self) -> dict[str, Any]:
        if self.rewards is None or not self._scored:
            return {}
        return {"scores": [[list(score) for score in _scores(g)] for g in self.groups]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        if "scores" in state:
            self._set_scores([[tuple(score) for score in of_group] for of_group in state["scores"]])


def _scores(group: Group) -> list[Score]:
    return [(t.reward, dict(t.objectives)) for t in group.trajectories]


def _completion(prompt: Prompt, index: int, trajectory: Trajectory) -> Completion:
    ids, reason = trajectory.token_ids, trajectory.finish_reason
    return Completion(prompt.id, index, ids, None, reason, versions=(), source=Source.DATA)
