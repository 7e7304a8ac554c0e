"""Scored groups -> packed groups -> Experience: all that the loss needs, before the first gradient.

The passes without gradient happen here: `old_logprobs` when a step makes several updates (or a KL goes into
the reward), `ref_logprobs` when the algorithm compares with a reference, values when it has a critic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rlhf.config.learner import LearnerConfig
from rlhf.distributed.world import World
from rlhf.learn.advantages import AdvantageContext, AdvantageInputsBuilder
from rlhf.learn.contrasts import RunningReward, contrasts_of, under_other_prompts, with_offset
from rlhf.learn.controllers import RewardScaler
from rlhf.learn.logprobs import sums_by_sequence, token_logprobs
from rlhf.learn.models import Models
from rlhf.models.packing import microbatches
from rlhf.models.policy import Policy
from rlhf.models.sharding import in_step
from rlhf.tensors.candidates import Candidates
from rlhf.torch_typed import numbers
from rlhf.types import (
    AdvantageInputs,
    Experience,
    FinishReason,
    Group,
    PackedGroups,
    Trajectory,
    is_learnable,
)


class ExperienceBuilder:
    """Makes the Experience of a step from its scored groups, with the passes without gradient."""

    def __init__(
        self,
        models: Models,
        world: World,
        section: LearnerConfig,
        context: AdvantageContext | None = None,
        *,
        temperature: float,
    ) -> None:
        """`temperature`: that of the rollouts; log-probs are computed at the same.

        `context` may be left out where the algorithm asks for nothing in it.
        """
        algorithm, context = models.algorithm, context or AdvantageContext()
        assert context.is_correct is not None or not algorithm.imitation_coef
        assert context.prompt_values is not None or not algorithm.needs_prompt_value
        assert context.temperature_factors is not None or algorithm.prompt_temperature is None
        self.models, self.algorithm, self.world, self.context = models, algorithm, world, context
        self.policy, self.critic = models.policy, models.critic
        self.precomputed: Callable[[Sequence[Group]], Tensor] | None = None
        """The reference's log-probs `[N]` of groups that were scored before; None: the reference is asked."""
        self.temperature, self.microbatch_tokens = temperature, section.microbatch_tokens
        self.scaler = RewardScaler(algorithm.reward_scaling, world.all_sum)
        self.inputs = AdvantageInputsBuilder(algorithm, context, self.scaler, world)
        self.kl_in_reward = algorithm.kl.coef > 0 and algorithm.kl.placement == "reward"
        preference = algorithm.preference
        # the second update of a step compares the policy with what it was before the first
        several = algorithm.has_advantages and section.epochs * section.minibatches > 1
        running = preference is not None and preference.baseline == "running_mean"
        self.needs_old = several or self.kl_in_reward or running
        self.running_reward = RunningReward(world) if running else None

    def build(
        self,
        groups: Sequence[Group],
        *,
        kl_coef: float,
        step: int = 0,
        group_numbers: Sequence[int] | None = None,
    ) -> Experience:
        """Packs and scores what can be learned from: trajectories with tokens and a reward.

        `group_numbers`: the number of each group among those of all ranks, where other ranks have groups.
        Raises RewardError: the algorithm reads an objective that no completion has.
        """
        present = [i for i, group in enumerate(groups) if any(map(is_learnable, group.trajectories))]
        groups = [_learnable(groups[i]) for i in present]
        numbers = list(range(len(groups))) if group_numbers is None else [group_numbers[i] for i in present]
        packed = self._pack(groups, None if group_numbers is None else numbers)
        pull, preference = None, self.algorithm.preference
        if preference is not None:
            contrasts, pull = contrasts_of(groups, preference)
            packed = replace(packed, contrasts=contrasts)
        old_logprobs, values = self._before_update(packed)
        ref_logprobs = self._ref_logprobs(groups, packed)
        iterate_logprobs = self._iterate_logprobs(packed, ref_logprobs)
        if preference is not None and packed.contrasts is not None and preference.baseline != "none":
            offset = preference.baseline_scale * self._baseline(
                groups, numbers, packed, old_logprobs, ref_logprobs
            )
            packed = replace(packed, contrasts=with_offset(packed.contrasts, offset))
        perception = None
        if self.models.perception is not None:
            perception = self.models.perception.inputs(
                packed, step=step, temperature=self.temperature, budget=self.microbatch_tokens
            )
        penalty = self._token_penalty(packed, old_logprobs, ref_logprobs, kl_coef)
        inputs = replace(self.inputs(groups, packed, penalty), values=values)
        return Experience(
            **fields_of(packed),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            iterate_logprobs=iterate_logprobs,
            perception=perception,
            critic=None if self.algorithm.critic is None else self.algorithm.critic.targets(inputs),
            correct=self._correct(groups),
            advantages=self._advantages(inputs),
            pull=None if pull is None else pull.to(self.world.device),
        )

    def _baseline(
        self,
        groups: Sequence[Group],
        numbers: Sequence[int],
        packed: PackedGroups,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
    ) -> float:
        """The log-ratio to the reference, in nats, from which a preference loss measures those of the step.

        The same on all ranks, each of which calls it.
        """
        preference = self.algorithm.preference
        assert preference is not None and ref_logprobs is not None
        if self.running_reward is not None:
            assert old_logprobs is not None
            return self.running_reward(
                sums_by_sequence(old_logprobs - ref_logprobs, packed).to(self.world.device)
            )
        assert self.models.reference is not None
        others = under_other_prompts(groups, numbers, self.world)
        packed = self._pack(others)
        differences = self.logprobs(self.policy, packed) - self.logprobs(self.models.reference, packed)
        ratios = sums_by_sequence(differences, packed)  # [S]
        sums = torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
        sums = self.world.all_sum(sums.to(self.world.device))
        total, count = float(sums[0]), float(sums[1])
        return max(total / count, 0.0) if count else 0.0

    def weights(self, groups: Sequence[Group]) -> list[float]:
        """The largest advantage of each trajectory, all of them as one batch; 0 for one without a reward."""
        inputs = self.scores(groups)
        advantages = self.algorithm.advantage(inputs).masked_fill(~inputs.loss_mask, -torch.inf)
        largest = torch.full_like(inputs.rewards, -torch.inf, dtype=advantages.dtype).scatter_reduce(
            0, inputs.sequence, advantages, "amax"
        )
        found = iter(numbers(largest))
        return [next(found) if is_learnable(t) else 0.0 for g in groups for t in g.trajectories]

    def scores(self, groups: Sequence[Group]) -> AdvantageInputs:
        """What advantages are computed from, for all learnable trajectories as one batch.

        No model makes a pass for it: a KL in the reward, which would need one, is left out.
        """
        groups = [_learnable(g) for g in groups if any(map(is_learnable, g.trajectories))]
        packed = self._pack(groups)
        return self.inputs(groups, packed, torch.zeros_like(packed.rollout_logprobs))

    def _pack(self, groups: Sequence[Group], group_numbers: Sequence[int] | None = None) -> PackedGroups:
        packed = pack_groups(
            groups,
            device=self.world.device,
            group_numbers=group_numbers,
            drop_truncated=self.algorithm.selection.drop_truncated,
        )
        references = self.models.references
        return packed if references is None else replace(packed, references=references.numbers(groups))

    def _ref_logprobs(self, groups: Sequence[Group], packed: PackedGroups) -> Tensor | None:
        if self.precomputed is not None:
            return self.precomputed(groups)
        # an exact KL has the reference in every pass of the learner, which gives its log-probs too
        if self.models.algorithm.needs_exact_kl:
            return None
        shares = self.models.by_reference(packed, range(len(packed.prompts)))
        # a share has zeros for the tokens of the others
        parts = [self.logprobs(s.reference, packed, s.groups) for s in shares if s.reference is not None]
        return reduce(torch.add, parts) if parts else None

    def _iterate_logprobs(self, packed: PackedGroups, ref_logprobs: Tensor | None) -> Tensor | None:
        iterate = self.models.iterate
        if iterate is None or not self.algorithm.needs_iterate:
            return None
        same = iterate is self.models.reference and ref_logprobs is not None
        return ref_logprobs if same else self.logprobs(iterate, packed)

    def logprobs(self, policy: Policy, packed: PackedGroups, groups: Sequence[int] | None = None) -> Tensor:
        """Log-probs `[N]` of all tokens under `policy`, without gradient; zeros outside of `groups`."""
        temperature, budget = self.temperature, self.microbatch_tokens
        return token_logprobs(
            policy, packed, self.world, temperature=temperature, budget=budget, groups=groups
        )

    @torch.no_grad()
    def _before_update(self, packed: PackedGroups) -> tuple[Tensor | None, Tensor | None]:
        """Log-probs of the policy, if `needs_old`, and values of the critic, if there is one, each `[N]`.

        One pass serves both where they share a trunk.
        """
        if not self.needs_old and self.critic is None:
            return None, None
        old = torch.zeros_like(packed.rollout_logprobs) if self.needs_old else None
        values = None if self.critic is None else torch.zeros_like(packed.rollout_logprobs)
        # a critic on its own trunk does not need the policy's hidden states
        own = self.critic is not None and self.critic.own
        groups = range(len(packed.prompts))
        micros = microbatches(packed, groups, self.microbatch_tokens, layout=self.policy.layout)
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

    def _token_penalty(
        self, packed: PackedGroups, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, kl_coef: float
    ) -> Tensor:
        """What a KL in the reward takes off each token `[N]`; zeros where there is none."""
        if not self.kl_in_reward:
            return torch.zeros_like(packed.rollout_logprobs)
        assert old_logprobs is not None and ref_logprobs is not None
        penalty = self.algorithm.token_penalty(old_logprobs, ref_logprobs, kl_coef)
        return penalty.masked_fill(~packed.loss_mask, 0.0)

    def _correct(self, groups: Sequence[Group]) -> Tensor | None:
        """bool `[S]`: which completions are imitated; None where the algorithm imitates none."""
        is_correct = self.context.is_correct
        if is_correct is None or not self.algorithm.imitation_coef:
            return None
        correct = [is_correct(t) for g in groups for t in g.trajectories]
        return torch.tensor(correct, dtype=torch.bool).to(self.world.device)

    def _advantages(self, inputs: AdvantageInputs) -> Tensor:
        advantages, limit = self.algorithm.advantage(inputs), self.context.advantage_clip
        return advantages if limit is None else advantages.clamp(-limit, limit)


def pack_groups(
    groups: Sequence[Group],
    *,
    device: torch.device,
    group_numbers: Sequence[int] | None = None,
    drop_truncated: bool = False,
) -> PackedGroups:
    """Packs groups whose trajectories all have tokens; their rewards are not needed.

    `group_numbers`: the number of each group among those of all ranks, where other ranks have groups.
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
    observed = tuple(t.observations for t in trajectories)
    return PackedGroups(
        prompts=tuple(torch.tensor(g.prompt.token_ids, device=device) for g in groups),
        token_ids=torch.tensor(token_ids, dtype=torch.long, device=device),
        sequence=torch.arange(len(trajectories)).repeat_interleave(lengths).to(device),
        positions=torch.cat([torch.empty(0, dtype=torch.long), *positions]).to(device),
        turn=torch.tensor([i for t in trajectories for i in t.turns], dtype=torch.long, device=device),
        group=torch.arange(len(groups)).repeat_interleave(sizes).to(device),
        loss_mask=torch.tensor(mask, dtype=torch.bool, device=device),
        rollout_logprobs=logprobs.to(device),
        recorded=recorded,
        numbers=None if group_numbers is None else torch.tensor(group_numbers, dtype=torch.long),
        images=images if any(images) else (),
        observed=observed if any(observed) else (),
        candidates=_candidates(trajectories, device),
    )


def fields_of(packed: PackedGroups) -> dict[str, Any]:
    """The fields of `packed` by name: what an Experience of the same tokens begins with."""
    return {f.name: getattr(packed, f.name) for f in fields(PackedGroups)}


def _learnable(group: Group) -> Group:
    """The group with its learnable trajectories only."""
    return replace(group, trajectories=tuple(filter(is_learnable, group.trajectories)))


def _candidates(trajectories: Sequence[Trajectory], device: torch.device) -> Candidates | None:
    """The candidates of all tokens; None where sampling was truncated nowhere."""
    if all(t.candidates is None for t in trajectories):
        return None
    return Candidates.join([t.candidates or Candidates.of([()] * len(t.token_ids)) for t in trajectories]).to(
        device
    )
