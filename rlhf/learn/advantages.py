"""Scored groups -> AdvantageInputs: rewards, objectives and what else an advantage is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from rlhf.algos.algorithm import Algorithm
from rlhf.distributed.world import World
from rlhf.learn.controllers import RewardScaler
from rlhf.rewards.workers.pool import RewardError
from rlhf.tensors.steps import StepRewards
from rlhf.types import AdvantageInputs, Group, PackedGroups, Trajectory, is_own


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageContext:
    """What a run knows, beside the rewards of a step, when it computes advantages."""

    objective_weights: Callable[[], Mapping[str, float]] = dict
    """Weights of the objectives in force, the same on all ranks; an objective not among them has weight 1."""
    prompt_values: Mapping[str, float] | None = None
    """V(prompt) by the prompt's id; empty until it has been learned. None: the algorithm does not ask."""
    temperature_factors: Mapping[str, float] | None = None
    """Factor of the temperature by the prompt's id, as for `prompt_values`."""
    is_correct: Callable[[Trajectory], bool] | None = None
    """Whether a completion solves its prompt, for an algorithm that imitates correct completions."""
    advantage_clip: float | None = None
    """Advantages are clamped to plus and minus this. None: they are not."""


@dataclass(frozen=True, slots=True)
class AdvantageInputsBuilder:
    """Makes the inputs of an advantage from groups whose trajectories all have tokens and a reward."""

    algorithm: Algorithm
    context: AdvantageContext
    scaler: RewardScaler
    world: World

    def __call__(self, groups: Sequence[Group], packed: PackedGroups, penalty: Tensor) -> AdvantageInputs:
        """`packed`: the groups; `penalty`: `[N]`, what a KL in the reward takes off each token.

        Every rank calls it. Raises RewardError: the algorithm reads an objective, or rewards of steps, that
        no completion of any rank has.
        """
        trajectories = [t for g in groups for t in g.trajectories]
        algorithm, context, device = self.algorithm, self.context, self.world.device
        names, has_steps = self._seen(trajectories)
        rewards = [algorithm.shape_reward(_reward(t), sum(t.loss_mask)) for t in trajectories]
        objectives = [[t.objectives.get(name, float("nan")) for name in names] for t in trajectories]
        weights = context.objective_weights()

        def by_sequence(by_prompt: Mapping[str, float] | None) -> Tensor | None:
            # empty until it has been learned, for which the data is scored as here
            if not by_prompt:
                return None
            return torch.tensor(
                [by_prompt[g.prompt.id] for g in groups for _ in g.trajectories], device=device
            )

        values, factors = context.prompt_values, context.temperature_factors
        return AdvantageInputs(
            rewards=self.scaler(torch.tensor(rewards, dtype=torch.float32, device=device)),
            objectives=torch.tensor(objectives, dtype=torch.float32, device=device).view(
                len(rewards), len(names)
            ),
            objective_weights=torch.tensor([weights.get(name, 1.0) for name in names], device=device),
            group=packed.group,
            token_penalty=penalty,
            sequence=packed.sequence,
            loss_mask=packed.loss_mask,
            turn=packed.turn,
            names=tuple(names),
            prompt_values=by_sequence(values) if algorithm.needs_prompt_value else None,
            temperature_factors=None if algorithm.prompt_temperature is None else by_sequence(factors),
            own=_own(trajectories, device),
            steps=self._steps(trajectories, rewards, packed) if has_steps else None,
            all_sum=self.world.all_sum,
        )

    def _seen(self, trajectories: Sequence[Trajectory]) -> tuple[list[str], bool]:
        """The objectives that trajectories of all ranks have, and whether any of them has rewards of steps.

        The same on every rank, though one may have seen only some of them. Raises RewardError.
        """
        own = sorted({name for t in trajectories for name in t.objectives})
        seen = self.world.gather((own, any(t.step_rewards for t in trajectories)))
        names = sorted({name for of_rank, _ in seen for name in of_rank})
        has_steps = any(found for _, found in seen)
        if names and (missing := [name for name in self.algorithm.objectives if name not in names]):
            raise RewardError(
                f"no completion of this step has the objective {missing[0]}, which the algorithm reads: they "
                f"have {', '.join(names)}; a function gives 0, not None, where it does not apply"
            )
        if names and self.algorithm.compares_steps and not has_steps:
            raise RewardError(
                "no completion of this step has rewards of single steps, which the algorithm compares: a "
                "reward function returns [(end, score), ...] for each completion, and reward_model has "
                "of_steps: each"
            )
        return names, has_steps

    def _steps(
        self, trajectories: Sequence[Trajectory], rewards: Sequence[float], packed: PackedGroups
    ) -> StepRewards:
        """`rewards`: of the trajectories, shaped and not scaled."""
        at = torch.full_like(packed.rollout_logprobs, torch.nan)
        start, places, earned = 0, list[int](), list[float]()
        for trajectory in trajectories:
            places += [start + token for token, _ in trajectory.step_rewards]
            earned += [reward for _, reward in trajectory.step_rewards]
            start += len(trajectory.token_ids)
        # in float64: where steps earned everything, float32 would leave a rest that is nothing but rounding
        rest = [
            r - fsum(reward for _, reward in t.step_rewards)
            for t, r in zip(trajectories, rewards, strict=True)
        ]
        at[torch.tensor(places, dtype=torch.long, device=at.device)] = self._scaled(earned, part=True)
        return StepRewards(at, self._scaled(rest, part=False))

    def _scaled(self, rewards: Sequence[float], *, part: bool) -> Tensor:
        """Scaled as the rewards of the step, which the scaler has seen."""
        plain = torch.tensor(rewards, dtype=torch.float32, device=self.world.device)
        return self.scaler.scaling.apply(plain, self.scaler.moments, part=part)


def _own(trajectories: Sequence[Trajectory], device: torch.device) -> Tensor | None:
    """bool `[S]`: what the policy sampled; None where it is all."""
    own = list(map(is_own, trajectories))
    return None if all(own) else torch.tensor(own, device=device)


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.reward is not None
    return trajectory.reward
