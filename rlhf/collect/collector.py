"""Collects the rollouts of one step: draws prompts, samples completions, returns scored groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rlhf.algos.algorithm import Algorithm
from rlhf.collect.budgets import Budgets
from rlhf.collect.curriculum import PromptOrder
from rlhf.collect.sampler import Hooks, Sampler, length_metrics
from rlhf.distributed.world import World
from rlhf.metrics import Metrics, Sum, merge
from rlhf.rewards.measures import reward_metrics
from rlhf.types import Group, Prompt


@dataclass(frozen=True, slots=True)
class Collected:
    """The groups of one step on this rank, and the position from which the next step draws prompts."""

    groups: list[Group]
    """Groups that the algorithm accepts; the step learns from them."""
    sampled: list[Group]
    """All sampled groups, including those that the algorithm does not accept."""
    position: int
    metrics: Metrics


class Pending:
    """The groups of a step: completions are sampled, but rewards may still be computed."""

    def __init__(
        self, wait: Callable[[], Collected] | None = None, *, collected: Collected | None = None
    ) -> None:
        """Takes either `wait`, which waits for the rewards and returns the groups, or `collected` groups."""
        assert (wait is None) != (collected is None)
        self._wait, self._collected = wait, collected

    def settle(self) -> Collected:
        """Waits for the rewards. Raises RewardError, which names the reward function."""
        if self._collected is None:
            assert self._wait is not None
            self._collected = self._wait()
        return self._collected


class Collector:
    """Samples groups for a step, a share on each rank; replaces groups that the algorithm does not accept."""

    def __init__(
        self, sampler: Sampler, order: PromptOrder, algorithm: Algorithm, budgets: Budgets, world: World
    ) -> None:
        self.sampler, self.order, self.algorithm, self.world = sampler, order, algorithm, world
        self.budgets = budgets

    def collect(self, position: int, hooks: Hooks) -> Collected:
        """`position`: number of prompts that the run has drawn so far, over all ranks and refills."""
        wanted = self.world.share(self.sampler.section.prompts_per_step)
        accepted: list[Group] = []
        sampled: list[Group] = []
        parts: list[Metrics] = []
        refills = self.algorithm.selection.refill
        for round_ in range(1 + refills):
            missing = self.world.gather(wanted - len(accepted))
            if not any(missing):
                break
            draws, prompts, position = self._draws(position, missing, hooks.step)
            told = hooks if round_ == 0 else _in_a_refill(hooks, round_, refills, len(accepted), wanted)
            groups, metrics = self._rollout(draws, prompts, told)
            sampled += groups
            accepted += [g for g in groups if self.algorithm.selection.keep(g)]
            parts.append(metrics)
        metrics = merge(parts) | {"rollout/groups": Sum(float(len(accepted)))} | self.sampler.measured()
        return Collected(accepted, sampled, position, metrics)

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """Like `collect`, but waits for rewards only if they decide what is sampled next."""
        if self.algorithm.selection.refill or self.budgets.probes:
            return Pending(collected=self.collect(position, hooks))
        wanted = self.world.gather(self.world.share(self.sampler.section.prompts_per_step))
        draws, prompts, position = self._draws(position, wanted, hooks.step)
        scorings = self.sampler.rollout(prompts, self.budgets.sizes(prompts), _labels(draws), hooks)
        measured = self.sampler.measured()

        def wait() -> Collected:
            hooks.phase("reward")
            groups, metrics = self.sampler.rewards.gather(scorings)
            metrics |= measured
            groups = _with_draws(groups, draws)
            accepted = [g for g in groups if self.algorithm.selection.keep(g)]
            metrics = metrics | length_metrics(groups) | {"rollout/groups": Sum(float(len(accepted)))}
            return Collected(accepted, groups, position, metrics)

        return Pending(wait)

    def _draws(self, position: int, wanted: Sequence[int], step: int) -> tuple[range, list[Prompt], int]:
        """The draws of this rank if each rank draws as many as it wants, their prompts, and the position
        after all draws."""
        before, mine = sum(wanted[: self.world.rank]), wanted[self.world.rank]
        prompts = self.order(position, sum(wanted), step)[before : before + mine]
        return range(position + before, position + before + mine), prompts, position + sum(wanted)

    def _rollout(self, draws: range, prompts: Sequence[Prompt], hooks: Hooks) -> tuple[list[Group], Metrics]:
        """One scored group per draw; with probes, samples the remaining completions after the first."""
        labels = _labels(draws)
        groups, metrics = self._sample(prompts, self.budgets.sizes(prompts), labels, hooks)
        rest = self.budgets.rest(groups)
        if any(any(sizes) for sizes in self.world.gather(rest)):
            labels = [f"{label}/rest" for label in labels]
            others, more = self._sample(prompts, rest, labels, hooks)
            groups = [
                Group(g.prompt, g.trajectories + h.trajectories) for g, h in zip(groups, others, strict=True)
            ]
            # reward metrics again, because the spread within a group needs the whole group
            metrics = merge([metrics, more]) | reward_metrics(groups)
        return _with_draws(groups, draws), metrics | length_metrics(groups)

    def _sample(
        self, prompts: Sequence[Prompt], sizes: Sequence[int], labels: Sequence[str], hooks: Hooks
    ) -> tuple[list[Group], Metrics]:
        """One scored group for each prompt."""
        scorings = self.sampler.rollout(prompts, sizes, labels, hooks)
        hooks.phase("reward")
        return self.sampler.rewards.gather(scorings)


def _labels(draws: range) -> list[str]:
    """The label of each draw, from which its seed is derived."""
    return [f"rollout/{draw}" for draw in draws]


def _with_draws(groups: Sequence[Group], draws: Sequence[int]) -> list[Group]:
    """The groups, each with its draw: its place in the run's order of prompts."""
    return [replace(group, draw=draw) for group, draw in zip(groups, draws, strict=True)]


def _in_a_refill(hooks: Hooks, number: int, refills: int, accepted: int, wanted: int) -> Hooks:
    """Hooks whose `detail` also says which refill it is, and how many groups are accepted so far."""
    where = f"refill {number} of {refills} with {accepted} of {wanted} groups accepted"

    def detail(text: str) -> None:
        hooks.detail(f"{where}, {text}")

    return replace(hooks, detail=detail)
