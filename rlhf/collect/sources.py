"""Builds what a step collects its completions from: rollouts, replay, data, or several of these."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rlhf.algos.prompt_temperature import PromptTemperature
from rlhf.checkpoints.stateful import Stateful
from rlhf.collect.offline import (
    DataBesideRollouts,
    DataThenRollouts,
    Draws,
    GroupSource,
    OfflineCollector,
    OfflineData,
)
from rlhf.collect.prompt_targets import data_exponents, data_targets, greedy_targets
from rlhf.collect.replay import Replay
from rlhf.collect.sampler import Sampler
from rlhf.config.run import Config
from rlhf.data.together import families
from rlhf.distributed.world import World
from rlhf.inputs import Inputs
from rlhf.learn.experience import ExperienceBuilder
from rlhf.learn.prompt_temperature import PromptTemperatures
from rlhf.learn.prompt_value import PromptValues
from rlhf.models.policy import Policy


class Sources:
    """A run's data, and the values and temperatures of its prompts, where the algorithm needs them."""

    def __init__(
        self, config: Config, inputs: Inputs, world: World, frozen: Policy, sampler: Sampler
    ) -> None:
        """`frozen`: the reference, or the policy before its first update, which is the same."""
        self.config, self.inputs, self.world, self.frozen = config, inputs, world, frozen
        self.data: OfflineData | None = None
        self.values: PromptValues | None = None
        self.temperature_factors: dict[str, float] = {}
        """Factors of temperatures by the prompt's id; empty until `preparations` have run or were loaded."""
        self.stateful: dict[str, Stateful] = {}
        self.preparations: list[Callable[[], str]] = []
        """Run once each, in this order, before the first step; each returns a line about its result."""
        if inputs.offline is not None:
            rewards = inputs.rewards if config.data.reward_column is None else None
            self.data = OfflineData(inputs.offline, rewards, world)
            self.stateful["offline"] = self.data
            self.preparations.append(self.data.prepare)
        if inputs.algorithm.needs_prompt_value:
            self.values = self._values(frozen, sampler)
            self.stateful["prompt_value"] = self.values
            self.preparations.append(self.values.prepare)

    def _values(self, frozen: Policy, sampler: Sampler) -> PromptValues:
        section = self.config.prompt_value
        if section.targets == "data":
            assert self.data is not None
            targets = data_targets(self.data)
        else:
            limit = self.config.rollout.max_completion_tokens
            targets = greedy_targets(sampler, self.world, max_tokens=limit)
        prompts = self.inputs.train.prompts
        return PromptValues(section, frozen, prompts, targets, self.world, seed=self.config.seed)

    def _add_prompt_temperature(self, temperature: PromptTemperature, experience: ExperienceBuilder) -> None:
        assert self.data is not None
        exponents = partial(data_exponents, temperature, self.data, experience)
        section, prompts, seed = self.config.prompt_value, self.inputs.train.prompts, self.config.seed
        picked = PromptTemperatures(
            section, self.frozen, prompts, temperature, exponents, self.world, seed=seed
        )
        picked.values = self.temperature_factors
        self.stateful["balance"] = picked
        self.preparations.append(picked.prepare)

    @property
    def prompt_values(self) -> dict[str, float] | None:
        """V(prompt) by the prompt's id; empty until `preparations` have run or were loaded."""
        return None if self.values is None else self.values.values

    def collector(self, rollouts: GroupSource, experience: ExperienceBuilder) -> GroupSource:
        """What a step is collected from: `rollouts`, with what the settings put beside them or before them.

        With `data.mode` offline there are no rollouts: data takes their place.
        """
        config = self.config
        if self.inputs.algorithm.prompt_temperature is not None:
            self._add_prompt_temperature(self.inputs.algorithm.prompt_temperature, experience)
        if config.replay.groups_per_step:
            rollouts = replay = Replay(rollouts, config.replay, self.inputs.train, config.seed, self.world)
            self.stateful["replay"] = replay
        if self.data is None:
            return rollouts
        if config.data.mix:
            rollouts = DataBesideRollouts(rollouts, self.data)
        size = 1 if config.data.sampling == "groups" else config.rollout.group_size
        together = families(config, self.data.dataset)
        draws = Draws(config.data.sampling, config.rollout.prompts_per_step * size, config.seed, together)
        from_data = OfflineCollector(self.data, draws, experience, self.world)
        if config.data.mode == "offline":
            return from_data
        return DataThenRollouts(from_data, rollouts, config.data.offline_steps)
