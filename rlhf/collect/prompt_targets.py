"""Targets for learning prompt values and prompt temperatures: rewards of greedy rollouts or of the data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf.algos.prompt_temperature import PromptTemperature
from rlhf.collect.offline import OfflineData
from rlhf.collect.sampler import Sampler
from rlhf.distributed.world import World
from rlhf.learn.experience import ExperienceBuilder
from rlhf.learn.prompt_value import Targets
from rlhf.rollout.engine import RolloutRequest, SamplingParams
from rlhf.torch_typed import pieces
from rlhf.types import Group, Prompt


def greedy_targets(sampler: Sampler, world: World, *, max_tokens: int) -> Targets:
    """Targets for prompt values: the reward of one greedy completion; each rank samples its share."""

    def targets(prompts: Sequence[Prompt]) -> list[float | None]:
        mine = prompts[world.rank :: world.size]
        params = SamplingParams(n=1, max_tokens=max_tokens, seed=0, temperature=0.0)
        completions = sampler.generate([RolloutRequest(p, params) for p in mine])
        groups, _ = sampler.score(mine, completions, 0)
        parts = world.gather([g.trajectories[0].reward for g in groups])
        return [parts[i % world.size][i // world.size] for i in range(len(prompts))]

    return targets


def data_targets(data: OfflineData) -> Targets:
    """Targets for prompt values: the mean reward of the prompt's completions in the data."""

    def mean(group: Group) -> float | None:
        return sum(group.rewards) / len(group.rewards) if group.rewards else None

    def targets(prompts: Sequence[Prompt]) -> list[float | None]:
        means = {g.prompt.id: mean(g) for g in data.groups}
        return [means[p.id] for p in prompts]

    return targets


def data_exponents(
    temperature: PromptTemperature, data: OfflineData, experience: ExperienceBuilder
) -> dict[str, Tensor]:
    """Targets for prompt temperatures: advantage / temperature of the data's completions `[G]`, by prompt id.

    Prompts with fewer than two rewards are left out, because a single reward cannot be compared.
    """
    groups = [g for g in data.groups if len(g.rewards) > 1]
    if not groups:
        return {}
    found = temperature.exponents(experience.scores(groups))
    parts = pieces(found.float(), [len(g.rewards) for g in groups])
    return {g.prompt.id: part for g, part in zip(groups, parts, strict=True)}
