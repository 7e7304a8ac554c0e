"""Scored groups -> Experience: everything the loss needs, complete, before the first gradient.

The passes without gradient happen here: `old_logprobs` when more than one update is made from the same
experience (or a KL goes into the reward), `ref_logprobs` when the algorithm compares with a reference, values
when it has a critic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.algos.algorithm import Algorithm
from rlhf.distributed.world import World
from rlhf.learn.controllers import RewardScaler
from rlhf.learn.critic import Critic
from rlhf.learn.perception import MaskedPasses
from rlhf.models.packing import microbatches
from rlhf.models.policy import Policy
from rlhf.models.sharding import in_step
from rlhf.torch_typed import numbers
from rlhf.types import AdvantageInputs, Candidates, Experience, FinishReason, Group, Trajectory, is_learnable


class ExperienceBuilder:
    """`keep_old`: the log-probs of the policy before its first update are needed (several updates a step)."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        algorithm: Algorithm,
        world: World,
        *,
        temperature: float,
        microbatch_tokens: int,
        keep_old: bool,
        advantage_clip: float | None = None,
        objective_weights: Callable[[], Mapping[str, float]] = dict,
        prompt_values: Mapping[str, float] | None = None,
        temperature_factors: Mapping[str, float] | None = None,
        critic: Critic | None = None,
        is_correct: Callable[[Trajectory], bool] | None = None,
        masked_passes: MaskedPasses | None = None,
    ) -> None:
        """`objective_weights` of the reward functions, the same on all ranks; an objective not among them has
        weight 1.

        `prompt_values` and `temperature_factors` by the prompt's id, when the algorithm has a use for them.
        `critic`: of an algorithm that has one. `is_correct`: for one that imitates correct completions.
        `masked_passes`: for one with a perception term.
        """
        assert (masked_passes is None) == (algorithm.perception is None)
        self.masked_passes = masked_passes
        assert (critic is None) == (algorithm.critic is None)
        assert is_correct is not None or not algorithm.imitation_coef
        self.critic, self.is_correct = critic, is_correct
        self.scaler = RewardScaler(algorithm.reward_scaling, world.all_sum)
        assert reference is not None or not algorithm.needs_reference
        assert prompt_values is not None or not algorithm.needs_prompt_value
        assert temperature_factors is not None or algorithm.prompt_temperature is None
        self.policy, self.reference, self.algorithm, self.world = policy, reference, algorithm, world
        self.temperature, self.microbatch_tokens = temperature, microbatch_tokens
        self.kl_in_reward = algorithm.kl.coef > 0 and algorithm.kl.placement == "reward"
        self.keep_old = keep_old or self.kl_in_reward
        self.advantage_clip, self.objective_weights = advantage_clip, objective_weights
        self.prompt_values = prompt_values if algorithm.needs_prompt_value else None
        self.temperature_factors = None if algorithm.prompt_temperature is None else temperature_factors

    def build(
        self,
        groups: Sequence[Group],
        *,
        kl_coef: float,
        step: int = 0,
        group_numbers: Sequence[int] | None = None,
    ) -> Experience:
        """Packs what can be learned from: trajectories with tokens and a reward, of groups that have any.

        `group_numbers`: numbers of the groups among those of all ranks, where there are others.
        """
        learnable = [replace(g, trajectories=tuple(filter(is_learnable, g.trajectories))) for g in groups]
        experience = pack_groups(
            [g for g in learnable if g.trajectories],
            device=self.world.device,
            drop_truncated=self.algorithm.drop_truncated,
        )
        if group_numbers is not None:
            present = [n for n, g in zip(group_numbers, learnable, strict=True) if g.trajectories]
            experience = replace(experience, numbers=torch.tensor(present, dtype=torch.long))
        values = None
        if self.keep_old or self.critic is not None:
            old, values = self._before_update(experience)
            experience = replace(experience, old_logprobs=old)
        # an exact KL has the reference in every pass of the learner, which gives its log-probs too
        if self.reference is not None and not self.algorithm.needs_exact_kl:
            experience = replace(experience, ref_logprobs=self._logprobs(self.reference, experience))
        if self.masked_passes is not None:
            perception = self.masked_passes.inputs(
                experience, step=step, temperature=self.temperature, budget=self.microbatch_tokens
            )
            experience = replace(experience, perception=perception)
        penalty = torch.zeros_like(experience.rollout_logprobs)
        if self.kl_in_reward:
            assert experience.old_logprobs is not None and experience.ref_logprobs is not None
            penalty = self.algorithm.token_penalty(experience.old_logprobs, experience.ref_logprobs, kl_coef)
            penalty = penalty.masked_fill(~experience.loss_mask, 0.0)
        trajectories = [t for g in learnable for t in g.trajectories]
        inputs = replace(self._scores(learnable, experience, penalty), values=values)
        if self.algorithm.critic is not None:
            experience = replace(experience, critic=self.algorithm.critic.targets(inputs))
        if self.algorithm.imitation_coef and self.is_correct is not None:
            correct = torch.tensor([self.is_correct(t) for t in trajectories], dtype=torch.bool)
            experience = replace(experience, correct=correct.to(self.world.device))
        advantages = self.algorithm.advantage(inputs)
        if self.advantage_clip is not None:
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return replace(experience, advantages=advantages)

    def weights(self, groups: Sequence[Group]) -> list[float]:
        """The largest advantage of each trajectory, all of them one batch; 0 for one that has no reward."""
        inputs = self.scores(groups)
        advantages = self.algorithm.advantage(inputs).masked_fill(~inputs.loss_mask, -torch.inf)
        largest = torch.full_like(inputs.rewards, -torch.inf, dtype=advantages.dtype).scatter_reduce(
            0, inputs.sequence, advantages, "amax"
        )
        found = iter(numbers(largest))
        return [next(found) if is_learnable(t) else 0.0 for g in groups for t in g.trajectories]

    def scores(self, groups: Sequence[Group]) -> AdvantageInputs:
        """What advantages are made of, for those that can be learned from, as one batch.

        No model is asked: a KL in the reward, which needs one, is left out.
        """
        learnable = [replace(g, trajectories=tuple(filter(is_learnable, g.trajectories))) for g in groups]
        experience = pack_groups(
            [g for g in learnable if g.trajectories],
            device=self.world.device,
            drop_truncated=self.algorithm.drop_truncated,
        )
        return self._scores(learnable, experience, torch.zeros_like(experience.rollout_logprobs))

    @torch.no_grad()
    def _logprobs(self, policy: Policy, experience: Experience) -> Tensor:
        result = torch.zeros_like(experience.rollout_logprobs)
        groups = range(len(experience.prompts))
        micros = microbatches(experience, groups, self.microbatch_tokens, layout=policy.layout)
        for micro in in_step(micros, policy.model, self.world):
            if micro is None:
                policy.dummy_pass()
                continue
            statistics = policy.statistics(micro.packed, temperature=self.temperature, want=("logprob",))
            assert statistics.logprob is not None
            result[micro.index] = statistics.logprob.to(result.dtype)
        return result

    @torch.no_grad()
    def _before_update(self, experience: Experience) -> tuple[Tensor | None, Tensor | None]:
        """Log-probs of the policy, if they are kept, and values of the critic, if there is one.

        One pass serves both where they share a trunk.
        """
        old = torch.zeros_like(experience.rollout_logprobs) if self.keep_old else None
        values = None if self.critic is None else torch.zeros_like(experience.rollout_logprobs)
        own = self.critic is not None and self.critic.own
        groups = range(len(experience.prompts))
        micros = microbatches(experience, groups, self.microbatch_tokens, layout=self.policy.layout)
        for micro in in_step(micros, self.policy.model, self.world):
            if micro is None:
                self._dummy_pass(policy=not own or old is not None)
                continue
            hidden = None if own and old is None else self.policy.hidden(micro.packed)
            if old is not None:
                statistics = self.policy.statistics(
                    micro.packed, temperature=self.temperature, want=("logprob",), hidden=hidden
                )
                assert statistics.logprob is not None
                old[micro.index] = statistics.logprob.to(old.dtype)
            if self.critic is not None and values is not None:
                values[micro.index] = self.critic.values(micro.packed, hidden).to(values.dtype)
        return old, values

    def _dummy_pass(self, *, policy: bool) -> None:
        if policy:
            self.policy.dummy_pass()
        if self.critic is not None and self.critic.own:
            self.critic.dummy_pass()

    def _scores(self, groups: Sequence[Group], experience: Experience, penalty: Tensor) -> AdvantageInputs:
        trajectories = [t for g in groups for t in g.trajectories]
        # the same objectives on every rank, though one may have seen only some of them
        seen = self.world.gather(sorted({name for t in trajectories for name in t.objectives}))
        names = sorted({name for part in seen for name in part})
        rewards = [self.algorithm.shape_reward(_reward(t), sum(t.loss_mask)) for t in trajectories]
        objectives = [[t.objectives.get(name, float("nan")) for name in names] for t in trajectories]
        weights, device = self.objective_weights(), self.world.device

        def of_prompts(known: Mapping[str, float] | None) -> Tensor | None:
            # empty as long as they are being learned
            if not known:
                return None
            return torch.tensor([known[g.prompt.id] for g in groups for _ in g.trajectories], device=device)

        return AdvantageInputs(
            rewards=self.scaler(torch.tensor(rewards, dtype=torch.float32, device=device)),
            objectives=torch.tensor(objectives, dtype=torch.float32, device=device).view(
                len(rewards), len(names)
            ),
            objective_weights=torch.tensor([weights.get(name, 1.0) for name in names], device=device),
            group=experience.group,
            token_penalty=penalty,
            sequence=experience.sequence,
            loss_mask=experience.loss_mask,
            prompt_values=of_prompts(self.prompt_values),
            temperature_factors=of_prompts(self.temperature_factors),
            all_sum=self.world.all_sum,
        )


def pack_groups(groups: Sequence[Group], *, device: torch.device, drop_truncated: bool = False) -> Experience:
    """The tensors of groups whose trajectories all have tokens; advantages are zeros, nothing is scored yet.

    `drop_truncated` takes trajectories that were cut at their limit out of the loss mask.
    """
    trajectories = [t for g in groups for t in g.trajectories]
    lengths = torch.tensor([len(t.token_ids) for t in trajectories], dtype=torch.long)
    positions = [
        torch.arange(len(g.prompt.token_ids), len(g.prompt.token_ids) + len(t.token_ids))
        for g in groups
        for t in g.trajectories
    ]
    sizes = torch.tensor([len(g.trajectories) for g in groups], dtype=torch.long)
    token_ids = [i for t in trajectories for i in t.token_ids]
    mask = [
        m and not (drop_truncated and t.finish_reason == FinishReason.LENGTH)
        for t in trajectories
        for m in t.loss_mask
    ]
    unknown = [t.rollout_logprobs is None for t in trajectories]
    stated = [p for t in trajectories for p in t.rollout_logprobs or (0.0,) * len(t.token_ids)]
    logprobs = torch.tensor(stated, dtype=torch.float32)
    recorded = ~torch.tensor(unknown).repeat_interleave(lengths).to(device) if any(unknown) else None
    images = tuple(g.prompt.pictures for g in groups)
    return Experience(
        prompts=tuple(torch.tensor(g.prompt.token_ids, device=device) for g in groups),
        token_ids=torch.tensor(token_ids, dtype=torch.long, device=device),
        sequence=torch.arange(len(trajectories)).repeat_interleave(lengths).to(device),
        positions=torch.cat([torch.empty(0, dtype=torch.long), *positions]).to(device),
        turn=torch.tensor([i for t in trajectories for i in t.turns], dtype=torch.long, device=device),
        group=torch.arange(len(groups)).repeat_interleave(sizes).to(device),
        loss_mask=torch.tensor(mask, dtype=torch.bool, device=device),
        rollout_logprobs=logprobs.to(device),
        old_logprobs=None,
        ref_logprobs=None,
        advantages=torch.zeros_like(logprobs, device=device),
        recorded=recorded,
        images=images if any(images) else (),
        candidates=_candidates(trajectories, device),
    )


def _candidates(trajectories: Sequence[Trajectory], device: torch.device) -> Candidates | None:
    """What their tokens were drawn from; None where nothing was truncated."""
    if all(t.candidates is None for t in trajectories):
        return None
    return Candidates.join([t.candidates or Candidates.of([()] * len(t.token_ids)) for t in trajectories]).to(
        device
    )


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.reward is not None
    return trajectory.reward
