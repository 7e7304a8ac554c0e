"""Decides which completions of a prompt are compared and learned from, for preference algorithms.

A group leaves here with the completions that the loss needs and no others, which would cost a forward pass
for nothing, and with its pairs in `Group.duels`. A group without a pair is not learned from: its rewards are
equal, or its completions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.preference.pairing import (
    LABELS,
    RULES,
    Comparison,
    Label,
    Rule,
    Scored,
    adjusted,
    compare_group,
    win_rates,
)
from rlhf.config.pairs import PairsConfig
from rlhf.data.revision import Reviser
from rlhf.learn.contrasts import compared_group
from rlhf.metrics import Mean, Metrics, Sum
from rlhf.plugins import load_plugin
from rlhf.types import Duel, FinishReason, Group, is_learnable, is_own


class Pairing:
    """Applies the rule of the section `pairs` to the groups of a step."""

    def __init__(
        self,
        section: PairsConfig,
        algorithm: Algorithm,
        win_rate: str | None = None,
        reviser: Reviser | None = None,
    ) -> None:
        """`win_rate`: the objective that a judge gives where there are no reward functions. `reviser`: makes
        second answers, for an algorithm that learns from those.

        Raises ValueError: the rule is a function that cannot be found.
        """
        self.section, self.preference, self.win_rate = section, algorithm.preference, win_rate
        revises = self.preference is not None and self.preference.form.revises
        assert reviser is not None or not revises
        self.reviser = reviser if revises else None
        self.own_only = algorithm.selection.own_only
        self.keeps_own = algorithm.has_advantages
        """Whether the policy's own samples are learned from besides (HyPO)."""
        self.rule: Rule = RULES[section.rule] if section.rule in RULES else _own_rule(section.rule)

    def __call__(self, groups: Sequence[Group]) -> tuple[list[Group], Metrics]:
        """The groups that are learned from, and what became of the others.

        Without a preference loss these are all groups, as they are.
        """
        if self.preference is None:
            return [self._own(g) for g in groups] if self.own_only else list(groups), {}
        paired: list[Group] = []
        metrics: Metrics = {}
        tied = identical = 0
        for group in groups:
            if len(group.trajectories) == 1 and self.preference.form.takes_singles:
                paired += [group] if is_learnable(group.trajectories[0]) else []
                continue
            found = self._comparisons(group)
            different = [c for c in found if not _same(group, c)]
            tied += not found
            identical += bool(found) and not different
            if different:
                paired.append(self._compared(group, different))
        total = float(len(groups))
        metrics["pairs/groups"] = Sum(float(len(paired)))
        metrics["pairs/tied"] = Mean(float(tied), total)
        metrics["pairs/identical"] = Mean(float(identical), total)
        return paired, metrics | _described(paired)

    def _comparisons(self, group: Group) -> list[Comparison]:
        """The comparisons of one group, by the places of its trajectories."""
        if len(group.trajectories) < 2:
            return []
        return compare_group(
            self._scored(group), rule=self.rule, label=self._label(group), min_gap=self.section.min_gap
        )

    def _own(self, group: Group) -> Group:
        """The policy's own trajectories, each with its win rate in place of its reward."""
        rates = win_rates(self._scored(group))
        own = [(t, r) for t, r in zip(group.trajectories, rates, strict=True) if is_own(t)]
        return replace(group, trajectories=tuple(replace(t, reward=rate) for t, rate in own), duels=())

    def _scored(self, group: Group) -> Scored:
        """What a rule sees: a trajectory that cannot be learned from has no reward, so it is in no
        comparison.
        """
        trajectories = group.trajectories
        scored = Scored(
            rewards=[t.reward if is_learnable(t) else None for t in trajectories],
            tokens=[sum(t.loss_mask) for t in trajectories],
            truncated=[t.finish_reason == FinishReason.LENGTH for t in trajectories],
            sources=[t.source for t in trajectories],
            duels={(d.first, d.second): d.probability for d in group.duels},
            draw=group.draw,
        )
        return adjusted(scored, truncated=self.section.truncated, length_penalty=self.section.length_penalty)

    def _compared(self, group: Group, comparisons: Sequence[Comparison]) -> Group:
        """The group with the trajectories that the loss depends on, in their order, and the comparisons as
        its duels.
        """
        assert self.preference is not None
        trajectories = group.trajectories
        learned = self.preference.learned(compared_group(group, comparisons))
        if self.keeps_own:
            learned |= {i for i, t in enumerate(trajectories) if is_own(t)}
        used = sorted(learned)
        place = {old: new for new, old in enumerate(used)}
        duels = tuple(Duel(place[c.better], place[cast(int, c.other)], c.probability) for c in comparisons)
        pair = replace(group, trajectories=tuple(trajectories[i] for i in used), duels=duels)
        if self.reviser is None:
            return pair
        if len(duels) != 1:
            raise ValueError(
                f"pairs.rule {self.section.rule} gives {len(duels)} pairs of one prompt, but second answers "
                "are made of one pair: take a rule that gives one, as best_worst"
            )
        return self.reviser.revised(pair)

    def _label(self, group: Group) -> Label:
        if self.section.labels == "auto":
            # a judge's duels have already made the rewards that the rule goes by
            decided = any(self.win_rate in t.objectives for t in group.trajectories)
            return LABELS["preference" if group.duels and not decided else "hard"]
        return LABELS[self.section.labels]


def _own_rule(path: str) -> Rule:
    found: Any = load_plugin(path)
    if not callable(found):
        raise ValueError(f"pairs.rule: {path} must be a function, got {found!r:.80}")
    return cast(Rule, found)


def _same(group: Group, comparison: Comparison) -> bool:
    """Whether both completions have the same tokens, so that nothing can be learned from the pair."""
    first, second = comparison.better, cast(int, comparison.other)
    return group.trajectories[first].token_ids == group.trajectories[second].token_ids


def _described(groups: Sequence[Group]) -> Metrics:
    duels = [d for g in groups for d in g.duels]
    trajectories = [t for g in groups for t in g.trajectories]
    truncated = sum(t.finish_reason == FinishReason.LENGTH for t in trajectories)
    found: Metrics = {}
    if duels:
        found["pairs/probability"] = Mean(sum(d.probability for d in duels), float(len(duels)))
    if trajectories:
        found["pairs/truncated"] = Mean(float(truncated), float(len(trajectories)))
    return found
