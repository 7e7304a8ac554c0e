"""Experience -> minibatches -> microbatches -> loss -> backward -> clip -> step.

A minibatch is one update, a microbatch one forward and backward pass. The loss of a microbatch is a sum
divided by the counts of the whole minibatch over all ranks, so how it is cut changes nothing but memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.algos.algorithm import LossOutput
from rlhf.algos.value import explained_variance
from rlhf.config.learner import LearnerConfig
from rlhf.distributed.world import World
from rlhf.learn.critic import Warmup
from rlhf.learn.dealing import minibatch_of
from rlhf.learn.models import Models
from rlhf.learn.optimizer import MasterAdamW, step_together
from rlhf.learn.pretraining import Pretraining
from rlhf.metrics import Max, Mean, Metrics, Sum, merge
from rlhf.models.packing import Microbatch, microbatches
from rlhf.models.sharding import in_step
from rlhf.torch_typed import integers, run_numbers
from rlhf.types import Counts, CriticTargets, Experience, LossInputs


class Learner:
    """Updates the policy, and the critic where there is one, from the Experience of a step."""

    def __init__(
        self,
        models: Models,
        optimizer: MasterAdamW,
        world: World,
        section: LearnerConfig,
        *,
        temperature: float,
        pretraining: Pretraining | None = None,
    ) -> None:
        """`temperature`: that of the rollouts; log-probs are computed at the same.

        `pretraining` adds the gradient of its texts to every update.
        """
        algorithm = models.algorithm
        self.algorithm, self.optimizer, self.world = algorithm, optimizer, world
        self.policy, self.critic, self.perception = models.policy, models.critic, models.perception
        # only an exact KL compares with the reference again in every pass
        self.reference = models.reference if algorithm.needs_exact_kl else None
        self.pretraining, self.warmup = pretraining, Warmup(algorithm.critic)
        self.section, self.temperature = section, temperature
        exact = () if self.reference is None else ("kl", "ref_logprob")
        self.want = ("logprob", "entropy", *exact)
        self.entropy: Tensor | None = None
        """`[N]` of the last experience, as its first pass found it; NaN where no pass was made."""

    def update(self, experience: Experience, *, step: int, seed: int, kl_coef: float) -> Metrics:
        """All updates of one step. Groups without signal skip the forward and count in every denominator."""
        return merge(
            [self.before(experience), *self.updates(experience, step=step, seed=seed, kl_coef=kl_coef)]
        )

    def before(self, experience: Experience) -> Metrics:
        """What is known of the experience before the first update."""
        return _advantage_metrics(experience) | _value_metrics(experience, self.world)

    def updates(
        self, experience: Experience, *, step: int, seed: int, kl_coef: float, done: int = 0
    ) -> Iterator[Metrics]:
        """The updates of one step, one by one, from the one after the first `done`."""
        parts = self.section.minibatches
        self.entropy = torch.full_like(experience.advantages, torch.nan)
        for update in range(done, self.section.epochs * parts):
            epoch, part = divmod(update, parts)
            groups = self._minibatch(experience, part, seed=seed, step=step, epoch=epoch)
            number = step * self.section.epochs * parts + update
            yield merge(self._update_once(experience, groups, number=number, step=step, kl_coef=kl_coef))

    def _update_once(
        self, experience: Experience, groups: list[int], *, number: int, step: int, kl_coef: float
    ) -> list[Metrics]:
        learned, skipped = self._with_signal(experience, groups, kl_coef)
        if not self._any_rank(bool(learned)):
            return [{"update/no_signal": Sum(1.0 / self.world.size)}]
        counts = self.counts(experience, groups)
        parts = self.accumulate(experience, learned, counts, kl_coef)
        if self.policy_learns:
            # of what is skipped it is 0
            parts.append({"loss/policy": Mean(0.0, skipped / max(counts.tokens, 1))})
        if self.pretraining is not None and self.policy_learns:
            parts.append(self.pretraining.accumulate(number))
        return [*parts, self._step(step)]

    def accumulate(
        self, experience: Experience, groups: list[int], counts: Counts, kl_coef: float
    ) -> list[Metrics]:
        """Adds the gradient of these groups' share of an update's loss, microbatch by microbatch."""
        parts: list[Metrics] = []
        micros = microbatches(experience, groups, self.section.microbatch_tokens, layout=self.policy.layout)
        for micro in in_step(micros, self.policy.model, self.world):
            if micro is None:
                torch.autograd.backward(self._dummy_pass())
                continue
            outputs = self._losses(experience, micro, counts, kl_coef)
            torch.autograd.backward([output.loss for output in outputs])
            parts += [output.metrics for output in outputs]
        return parts

    def _losses(
        self, experience: Experience, micro: Microbatch, counts: Counts, kl_coef: float
    ) -> list[LossOutput]:
        """Of the policy, unless it is frozen, and of the critic, if there is one."""
        hidden, outputs = None, list[LossOutput]()
        if self.policy_learns:
            hidden = self.policy.hidden(micro.packed)
            outputs.append(self.algorithm.loss(self._loss_inputs(experience, micro, hidden, counts, kl_coef)))
        if self.critic is not None:
            assert experience.critic is not None
            index = micro.index
            targets = CriticTargets(experience.critic.values[index], experience.critic.returns[index])
            mask, sequence = experience.loss_mask[index], run_numbers(experience.sequence[index])
            values = self.critic.values(micro.packed, hidden).to(targets.values.dtype)
            outputs.append(self.algorithm.value_loss(values, targets, mask, sequence, counts))
        return outputs

    def _dummy_pass(self) -> list[Tensor]:
        """The passes of `_losses` with nothing in them."""
        dummies = [self.policy.dummy_pass(self.reference)] if self.policy_learns else []
        if self.critic is not None and (self.critic.own or not self.policy_learns):
            dummies.append(self.critic.dummy_pass())
        return dummies

    @property
    def policy_learns(self) -> bool:
        """False during the critic's warm-up."""
        return self.warmup.over

    def _step(self, step: int) -> Metrics:
        """The schedule of the policy begins when it begins to learn."""
        self.optimizer.begins = self.warmup.steps
        optimizers = {"lr": (self.optimizer, step)} if self.policy_learns else {}
        if self.critic is not None:
            optimizers["critic/lr"] = (self.critic.optimizer, step)
        return step_together(optimizers, self.world)

    def _loss_inputs(
        self, experience: Experience, micro: Microbatch, hidden: Tensor, counts: Counts, kl_coef: float
    ) -> LossInputs:
        statistics = self.policy.statistics(
            micro.packed,
            temperature=self.temperature,
            want=self.want,
            reference=self.reference,
            hidden=hidden,
        )
        index = micro.index
        logprobs, entropy = statistics.logprob, statistics.entropy
        assert logprobs is not None and entropy is not None
        if self.entropy is not None:
            seen = self.entropy[index]
            self.entropy[index] = torch.where(seen.isnan(), entropy.detach().to(seen.dtype), seen)
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
            correct=None if experience.correct is None else experience.correct[experience.sequence[index]],
            perception=None
            if self.perception is None
            else self.perception.batch(experience, micro, hidden, temperature=self.temperature),
        )

    def _minibatch(self, experience: Experience, part: int, *, seed: int, step: int, epoch: int) -> list[int]:
        """The groups of this rank in the `part`-th minibatch of one pass; all ranks shuffle alike."""
        numbers = list(range(len(experience.prompts)))
        if experience.numbers is not None:
            numbers = integers(experience.numbers)
        total = 1 + max(self.world.gather(max(numbers, default=-1)))
        parts = minibatch_of(total, self.section.minibatches, seed=seed, step=step, epoch=epoch)
        return [group for group, number in enumerate(numbers) if parts[number] == part]

    def counts(self, experience: Experience, groups: list[int]) -> Counts:
        """The denominators of an update from these groups of this rank, and those of the other ranks."""
        group, chosen = experience.group, torch.tensor(groups, dtype=torch.long, device=self.world.device)
        valid = torch.bincount(experience.sequence[experience.loss_mask], minlength=len(group))
        valid = valid * torch.isin(group, chosen)
        correct = valid[:0] if experience.correct is None else valid[experience.correct]
        totals = self.world.all_sum(torch.stack([valid.sum(), (valid > 0).sum(), correct.sum()]))
        return Counts(*integers(totals))

    def _with_signal(
        self, experience: Experience, groups: list[int], kl_coef: float
    ) -> tuple[list[int], int]:
        """Those with a gradient, and the tokens of the others; the device is asked once for all of them."""
        algorithm, mask = self.algorithm, experience.loss_mask
        everywhere = algorithm.learns_at_zero(kl_coef)
        telling = mask if everywhere else mask & (experience.advantages != 0)
        group, zeros = experience.group[experience.sequence], mask.new_zeros(len(experience.prompts)).long()
        counts = integers(torch.cat([zeros.index_add(0, group, m.long()) for m in (mask, telling)]))
        tokens, told = counts[: len(zeros)], counts[len(zeros) :]
        seen = [algorithm.perception is not None and any(experience.images[g : g + 1]) for g in groups]
        learned = [g for g, looks in zip(groups, seen, strict=True) if (tokens if looks else told)[g]]
        return learned, sum(tokens[g] for g in groups) - sum(tokens[g] for g in learned)

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


def _value_metrics(experience: Experience, world: World) -> Metrics:
    """How much the critic knew before it learned from this experience."""
    if experience.critic is None:
        return {}
    share = explained_variance(
        experience.critic.values, experience.critic.returns, experience.loss_mask, all_sum=world.all_sum
    )
    return {"critic/explained_variance": Mean(share)} if math.isfinite(share) else {}
