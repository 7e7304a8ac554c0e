"""Experience -> minibatches -> microbatches -> loss -> backward -> clip -> step.

A minibatch is one update, a microbatch one forward and backward pass. The loss of a microbatch is a sum
divided by the counts of the whole minibatch over all ranks, so how it is cut changes nothing but memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlhf.algos.algorithm import Algorithm
from rlhf.config import LearnerConfig
from rlhf.distributed import World, derive_seed
from rlhf.metrics import Max, Mean, Metrics, Sum, merge
from rlhf.optimizer import MasterAdamW
from rlhf.packing import Microbatch, microbatches
from rlhf.policy import Policy
from rlhf.typed import integers, run_numbers
from rlhf.types import Counts, Experience, LossInputs


class Learner:
    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        algorithm: Algorithm,
        optimizer: MasterAdamW,
        world: World,
        section: LearnerConfig,
        *,
        temperature: float,
    ) -> None:
        self.policy, self.algorithm, self.optimizer, self.world = policy, algorithm, optimizer, world
        self.reference = reference if algorithm.needs_exact_kl else None
        self.section, self.temperature = section, temperature
        exact = () if self.reference is None else ("kl", "ref_logprob")
        self.want = ("logprob", "entropy", *exact)

    def update(self, experience: Experience, *, step: int, seed: int, kl_coef: float) -> Metrics:
        """All updates of one step. Groups without signal skip the forward and count in every denominator."""
        parts: list[Metrics] = [_advantage_metrics(experience)]
        for epoch in range(self.section.epochs):
            for groups in self._minibatches(experience, derive_seed(seed, "minibatches", step, epoch)):
                parts += self._update_once(experience, groups, step=step, kl_coef=kl_coef)
        return merge(parts)

    def _update_once(
        self, experience: Experience, groups: list[int], *, step: int, kl_coef: float
    ) -> list[Metrics]:
        learned = [g for g in groups if self._has_signal(experience, g, kl_coef)]
        if not self._any_rank(bool(learned)):
            return [{"update/no_signal": Sum(1.0 / self.world.size)}]
        counts = self.counts(experience, groups)
        return [*self.accumulate(experience, learned, counts, kl_coef), self.optimizer.step(step, self.world)]

    def accumulate(
        self, experience: Experience, groups: list[int], counts: Counts, kl_coef: float
    ) -> list[Metrics]:
        """Adds the gradient of these groups' share of an update's loss, microbatch by microbatch."""
        parts: list[Metrics] = []
        for micro in microbatches(
            experience, groups, self.section.microbatch_tokens, share=self.policy.shared_prefix
        ):
            output = self.algorithm.loss(self._loss_inputs(experience, micro, counts, kl_coef))
            torch.autograd.backward(output.loss)
            parts.append(output.metrics)
        return parts

    def _loss_inputs(
        self, experience: Experience, micro: Microbatch, counts: Counts, kl_coef: float
    ) -> LossInputs:
        statistics = self.policy.statistics(
            micro.packed, temperature=self.temperature, want=self.want, reference=self.reference
        )
        index = micro.index
        logprobs, entropy = statistics.logprob, statistics.entropy
        assert logprobs is not None and entropy is not None
        old, ref = experience.old_logprobs, statistics.ref_logprob
        if experience.ref_logprobs is not None:
            ref = experience.ref_logprobs[index]
        return LossInputs(
            logprobs=logprobs,
            entropy=entropy if self.algorithm.entropy_coef else entropy.detach(),
            exact_kl=statistics.kl,
            old_logprobs=logprobs.detach() if old is None else old[index],
            rollout_logprobs=experience.rollout_logprobs[index],
            ref_logprobs=ref,
            advantages=experience.advantages[index],
            loss_mask=experience.loss_mask[index],
            sequence=run_numbers(experience.sequence[index]),
            turn=experience.turn[index],
            counts=counts,
            kl_coef=kl_coef,
            recorded=None if experience.recorded is None else experience.recorded[index],
        )

    def _minibatches(self, experience: Experience, seed: int) -> Iterator[list[int]]:
        num_groups, parts = len(experience.prompts), self.section.minibatches
        order = integers(torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed)))
        for part in range(parts):
            yield sorted(order[part::parts])

    def counts(self, experience: Experience, groups: list[int]) -> Counts:
        """The denominators of an update from these groups of this rank, and those of the other ranks."""
        group, chosen = experience.group, torch.tensor(groups, dtype=torch.long, device=self.world.device)
        valid = torch.bincount(experience.sequence[experience.loss_mask], minlength=len(group))
        valid = valid[torch.isin(group, chosen)]
        tokens, sequences = integers(self.world.all_sum(torch.stack([valid.sum(), (valid > 0).sum()])))
        return Counts(tokens=tokens, sequences=sequences)

    def _has_signal(self, experience: Experience, group: int, kl_coef: float) -> bool:
        tokens = (experience.group[experience.sequence] == group) & experience.loss_mask
        algorithm = self.algorithm
        kl_in_loss = kl_coef and algorithm.kl.placement == "loss"
        if algorithm.entropy_coef or kl_in_loss or not algorithm.silent_at_zero:
            return bool(tokens.any())
        return bool((experience.advantages[tokens] != 0).any())

    def _any_rank(self, flag: bool) -> bool:
        return bool(self.world.all_sum(torch.tensor(int(flag), device=self.world.device)).item())


def _advantage_metrics(experience: Experience) -> Metrics:
    """Share of sequences whose advantages are all zero: they teach nothing."""
    informative = torch.bincount(
        experience.sequence, weights=(experience.advantages != 0).double(), minlength=len(experience.group)
    )
    largest = experience.advantages.abs().max().item() if len(experience.advantages) else 0.0
    zero = int((informative == 0).sum())
    return {
        "advantage/zero_fraction": Mean(float(zero), float(len(experience.group))),
        "advantage/abs_max": Max(largest),
    }
