"""Decides how many completions each prompt of a step gets: `group_size` for all, or by success rate.

The rules that give more completions to prompts with more to learn from are in `rlhf/algos/budget.py`. The
budget is shared by all ranks: with every rule a step samples `group_size` completions per prompt on average
or, if `budget.cost` is tokens, as many tokens as these are expected to have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf.algos.budget import SuccessTracker, allocate, allocate_tokens, budget_metrics
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.run import Config
from rlhf.data.identity import identity
from rlhf.distributed.world import World
from rlhf.metrics import Metrics
from rlhf.rewards.success import check_objective, is_correct, success_value
from rlhf.types import Group, Prompt

log = logging.getLogger(__name__)


class Budgets(Stateful):
    """Tracks the success rate of each prompt seen so far and allocates completions by it.

    Prompts are known by their contents, so that a run goes on with edited data.
    """

    def __init__(self, config: Config, world: World, *, learns_rewards: bool = True) -> None:
        """`learns_rewards`: whether the policy learns from rewards; else `observe` measures nothing."""
        section, reward, group_size = config.budget, config.reward, config.rollout.group_size
        # a win rate compares the completions of a prompt: none of them is correct by itself
        self.measures = learns_rewards and not (reward.preference is not None and not reward.functions)
        self.section, self.reward, self.group_size, self.world = section, reward, group_size, world
        prior = None if section.prior is None else (section.prior, section.prior)
        self.tracker = SuccessTracker(prior=prior)
        self.tokens: dict[str, float] = {}
        """Mean tokens of each prompt's completions at its last visit, if `budget.cost` is tokens."""

    @property
    def probes(self) -> bool:
        """Whether a step samples a few completions (probes) first, whose outcomes decide how many follow."""
        return self.section.rule != "uniform" and bool(self.section.probes)

    def sizes(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many completions each of this rank's prompts gets first; with probes, how many probes.

        Every rank must call it, even without prompts.
        """
        if self.section.rule == "uniform":
            return [self.group_size] * len(prompts)
        if self.section.probes:
            return [self.section.probes] * len(prompts)
        return self._allocate([(identity(p), []) for p in prompts])

    def rest(self, probed: Sequence[Group]) -> list[int]:
        """How many more completions each prompt gets after its probes. Every rank must call it."""
        if not self.section.probes or self.section.rule == "uniform":
            return [0] * len(probed)
        sizes = self._allocate([(identity(g.prompt), self._outcomes(g)) for g in probed])
        return [size - self.section.probes for size in sizes]

    def _allocate(self, mine: Sequence[tuple[str, list[float]]]) -> list[int]:
        """Completions of this rank's prompts, by one allocation over all ranks.

        `mine`: for each prompt its identity and the outcomes of this step's probes.
        """
        parts = self.world.gather(mine)
        names = [name for part in parts for name, _ in part]
        if not names:
            return []
        rates = [self.tracker.rate(name, also=outcomes) for part in parts for name, outcomes in part]
        low, high = self.section.low, self.section.high
        if self.section.cost == "tokens":
            # a prompt never seen has the mean of the prior, which is symmetric: 1/2
            known = [0.5 if p is None else p for p in rates]
            tokens = self._expected_tokens(names)
            sizes = allocate_tokens(known, tokens, self.group_size * sum(tokens), low, high)
        else:
            sizes = allocate(rates, self.group_size * len(rates), low, high, unknown=self.group_size)
        first = sum(len(part) for part in parts[: self.world.rank])
        return sizes[first : first + len(mine)]

    def _expected_tokens(self, names: Sequence[str]) -> list[float]:
        """Expected tokens of a completion of each prompt; for a prompt never seen the mean of the others."""
        seen = [self.tokens[name] for name in names if name in self.tokens]
        mean = sum(seen) / len(seen) if seen else 1.0
        return [self.tokens.get(name, mean) for name in names]

    def _outcomes(self, group: Group) -> list[float]:
        """1 for each correct and 0 for each other completion; those without a reward are left out."""
        scored = [t for t in group.trajectories if success_value(t, self.reward) is not None]
        return [float(is_correct(t, self.reward)) for t in scored]

    def observe(self, groups: Sequence[Group]) -> Metrics:
        """Updates the success rates with the outcomes of a step; every rank uses those of all ranks.

        Returns what the rollouts were good for, without the sizes of a uniform budget, which are all the
        same.
        """
        check_objective(groups, self.reward)
        mine = [(identity(g.prompt), self._outcomes(g), _mean_tokens(g)) for g in groups]
        for part in self.world.gather(mine):
            for name, outcomes, tokens in part:
                self.tracker.update(name, outcomes)
                if self.section.cost == "tokens":
                    self.tokens[name] = tokens
        rewards = [float("nan") if t.reward is None else t.reward for g in groups for t in g.trajectories]
        index = [i for i, g in enumerate(groups) for _ in g.trajectories]
        threshold = self.reward.success_threshold
        group = torch.tensor(index, dtype=torch.long)
        if not self.measures:
            return {}
        found = budget_metrics(torch.tensor(rewards), group, threshold=threshold)
        if self.section.rule != "uniform":
            return found
        return {
            name: value
            for name, value in found.items()
            if not name.startswith(("budget/size_", "budget/largest"))
        }

    def state(self) -> dict[str, Any]:
        return {"success": self.tracker.state_dict(), "tokens": dict(self.tokens), "by": "contents"}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        if state.get("by") != "contents":
            # a checkpoint of an earlier version, where prompts were known by their lines
            if self.section.rule != "uniform":
                log.warning("the checkpoint has success rates by line, which are not used: they begin anew")
            return
        self.tracker.load_state_dict(state["success"])
        self.tokens = dict(state["tokens"])


def _mean_tokens(group: Group) -> float:
    return max(1.0, sum(len(t.token_ids) for t in group.trajectories) / max(1, len(group.trajectories)))
