"""Completions become scored groups: every function once for the whole batch, weighted and added up.

A function that says None for a sample does not apply to it. A sample on which one fails (NaN, infinity, an
exception), or to which none applies, has no reward: it is not learned from, which is not the same as a reward
of 0.
"""

from __future__ import annotations

import logging
import math
import numbers
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from torch import Tensor

from rlhf.metrics import Mean, Metrics
from rlhf.rewards.plugin import ALWAYS_GIVEN, Reward, RewardSpec, load_reward
from rlhf.types import Completion, Group, Prompt, Trajectory

logger = logging.getLogger(__name__)

Scores = dict[str, float]
"""Objective to value; empty: the function does not apply."""


class RewardError(RuntimeError):
    """A reward function returns what is no reward, or too many samples got none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of a step, end to end: sample `i` belongs to `prompts[i]`."""

    prompts: list[Prompt]
    completions: list[Completion]
    texts: list[str]

    def arguments(self, trainer_state: Mapping[str, Any]) -> dict[str, Any]:
        """What a reward function may ask for. New lists at each call: a function may change its own."""
        is_text = [isinstance(p.content, str) for p in self.prompts]
        columns = self.prompts[0].columns
        return {
            **{name: [p.columns[name] for p in self.prompts] for name in columns},
            "prompts": [p.content if isinstance(p.content, str) else list(p.content) for p in self.prompts],
            "completions": [
                text if plain else [{"role": "assistant", "content": text}]
                for text, plain in zip(self.texts, is_text, strict=True)
            ],
            "completion_ids": [list(c.token_ids) for c in self.completions],
            "trainer_state": SimpleNamespace(**trainer_state),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one function said of every sample; None where it failed."""

    reward: Reward
    scores: list[Scores | None]
    cause: Exception | str | None = None
    """Of the first failure."""

    def failures(self) -> str:
        """For people. Empty when there were none."""
        failed = self.scores.count(None)
        if not failed:
            return ""
        cause = (
            f"{type(self.cause).__name__}: {self.cause}" if isinstance(self.cause, Exception) else self.cause
        )
        return f"{self.reward.name} failed on {failed} ({cause})"


class Rewards:
    """Every reward function of a run.

    `columns` are those of the dataset, beside the prompt. Raises ValueError for a function that cannot be
    loaded, and for one that needs a column not among them.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], columns: Iterable[str], *, max_failed_share: float = 0.1
    ) -> None:
        columns = tuple(columns)
        taken = sorted(set(columns).intersection(ALWAYS_GIVEN))
        if taken:
            raise ValueError(
                f"the dataset's column {taken[0]!r} has a name that reward functions get otherwise"
            )
        self._rewards = _name_apart(load_reward(spec) for spec in specs)
        for reward in self._rewards:
            reward.check_columns(columns)
        self._max_failed_share = max_failed_share
        self._has_raised: set[str] = set()
        self._owner: dict[str, Reward] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective seen so far: a function that returns dicts names them when called."""
        return {objective: reward.weight for objective, reward in self._owner.items()}

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        *,
        trainer_state: Mapping[str, Any],
    ) -> tuple[list[Group], Metrics]:
        """Scores the completions of each prompt; `texts` are the completions decoded, without special tokens.

        A trajectory's reward is the sum over its objectives of the function's weight times the value.

        Raises RewardError, which names the function, when one returns the wrong length or type, and when more
        than `max_failed_share` of the samples have no reward.
        """
        batch = Batch(
            [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group],
            [completion for group in completions for completion in group],
            [text for group in texts for text in group],
        )
        verdicts = [self._call(reward, batch, trainer_state) for reward in self._rewards if batch.prompts]
        samples = iter(
            [
                self._trajectory(completion, text, [(v.reward, v.scores[i]) for v in verdicts])
                for i, (completion, text) in enumerate(zip(batch.completions, batch.texts, strict=True))
            ]
        )
        groups = [
            Group(prompt, tuple(next(samples) for _ in group))
            for prompt, group in zip(prompts, completions, strict=True)
        ]
        self._refuse_too_many_failures(groups, verdicts)
        return groups, _metrics(groups)

    def _call(self, reward: Reward, batch: Batch, trainer_state: Mapping[str, Any]) -> Verdict:
        try:
            result = reward(batch.arguments(trainer_state))
        except Exception as error:  # a plug-in may raise anything, and the run outlives what it is allowed to
            if reward.name not in self._has_raised:
                logger.exception("reward function %s raised on %d samples", reward.name, len(batch.texts))
                self._has_raised.add(reward.name)
            return Verdict(reward, [None] * len(batch.texts), error)
        scores: list[Scores | None] = []
        cause = None
        for value, text in zip(_values(reward, result, len(batch.texts)), batch.texts, strict=True):
            read = _read(reward, value)
            finite = all(math.isfinite(number) for number in read.values())
            if not finite and cause is None:
                cause = f"{value!r} for the completion {text!r:.80}"
            scores.append(read if finite else None)
        return Verdict(reward, scores, cause)

    def _trajectory(
        self, completion: Completion, text: str, scored: Sequence[tuple[Reward, Scores | None]]
    ) -> Trajectory:
        objectives: Scores = {}
        total = 0.0
        for reward, scores in scored:
            for objective, value in (scores or {}).items():
                if self._owner.setdefault(objective, reward) is not reward:
                    raise RewardError(
                        f"reward functions {self._owner[objective].name} and {reward.name} both name an "
                        f"objective {objective!r}; rename one"
                    )
                objectives[objective] = value
                total += reward.weight * value
        complete = bool(objectives) and all(scores is not None for _, scores in scored)
        return Trajectory.single_turn(
            completion, text=text, reward=total if complete else None, objectives=objectives
        )

    def _refuse_too_many_failures(self, groups: Sequence[Group], verdicts: Sequence[Verdict]) -> None:
        rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
        without = rewards.count(None)
        if without <= self._max_failed_share * len(rewards):
            return
        blame = "; ".join(failures for verdict in verdicts if (failures := verdict.failures()))
        raise RewardError(
            f"{without} of {len(rewards)} samples have no reward, more than "
            f"max_failed_share = {self._max_failed_share}: {blame or 'no function applies to them'}"
        ) from next((verdict.cause for verdict in verdicts if isinstance(verdict.cause, Exception)), None)


def _name_apart(rewards: Iterable[Reward]) -> tuple[Reward, ...]:
    """The same function twice, with other parameters, is two objectives: `match` and `match_2`."""
    apart: dict[str, Reward] = {}
    for reward in rewards:
        name, number = reward.name, 1
        while name in apart:
            number += 1
            name = f"{reward.name}_{number}"
        apart[name] = replace(reward, name=name)
    return tuple(apart.values())


def _values(reward: Reward, result: object, count: int) -> list[Any]:
    if isinstance(result, Tensor | np.ndarray):
        result = cast(Any, result).tolist()
    if not isinstance(result, list | tuple):
        raise RewardError(
            f"reward function {reward.name} must return a list of {count} values, one a completion, "
            f"got {type(result).__name__} {result!r:.80}"
        )
    values = cast(Sequence[Any], result)
    if len(values) != count:
        raise RewardError(
            f"reward function {reward.name} must return {count} values, one a completion, got {len(values)}"
        )
    return list(values)


def _read(reward: Reward, value: object) -> Scores:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {reward.name: _number(reward, value)}
    objectives = cast(Mapping[object, object], value)
    if not all(isinstance(name, str) for name in objectives):
        raise RewardError(f"reward function {reward.name} must name objectives by text, got {value!r:.80}")
    return {str(name): _number(reward, part) for name, part in objectives.items() if part is not None}


def _number(reward: Reward, value: object) -> float:
    if isinstance(value, numbers.Real | np.bool_) or (isinstance(value, Tensor) and value.numel() == 1):
        try:
            return float(cast(Any, value))
        except OverflowError:
            return math.inf
    raise RewardError(
        f"reward function {reward.name} must return numbers, dicts of numbers or None, "
        f"got {type(value).__name__} {value!r:.80}"
    )


def _metrics(groups: Sequence[Group]) -> Metrics:
    """`reward/std` is the mean over groups of the standard deviation within the group."""
    samples = [trajectory for group in groups for trajectory in group.trajectories]
    if not samples:
        return {}
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    spreads = [statistics.pstdev(group.rewards) for group in groups if group.rewards]
    metrics: Metrics = {
        "reward/mean": Mean(math.fsum(rewards), len(rewards)),
        "reward/std": Mean(math.fsum(spreads), len(spreads)),
        "reward/failed": Mean(len(samples) - len(rewards), len(samples)),
    }
    for objective in sorted({name for sample in samples for name in sample.objectives}):
        values = [sample.objectives[objective] for sample in samples if objective in sample.objectives]
        metrics[f"reward/{objective}"] = Mean(math.fsum(values), len(values))
    return metrics
