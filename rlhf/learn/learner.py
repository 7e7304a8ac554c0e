"""Experience -> minibatches -> microbatches -> loss -> backward -> clip -> step.

A minibatch is one update, a microbatch one forward and backward pass. The loss of a microbatch is a sum
divided by the counts of the whole minibatch over all ranks, so microbatches of another size change nothing
but memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.algos.algorithm import LossOutput
from rlhf.algos.reduction import Where
from rlhf.algos.segments import in_last_turn
from rlhf.algos.value import explained_variance
from rlhf.config.learner import LearnerConfig
from rlhf.distributed.world import World
from rlhf.kernels.token_stats import TokenStats
from rlhf.learn.critic import Warmup
from rlhf.learn.dealing import minibatch_of
from rlhf.learn.models import Models
from rlhf.learn.optimizer import MasterAdamW, step_together
from rlhf.learn.preference.twin import Twin
from rlhf.learn.pretraining import Pretraining
from rlhf.metrics import Max, Mean, Metrics, Sum, merge
from rlhf.models.packing import Microbatch, microbatches
from rlhf.models.policy import Policy
from rlhf.models.sharding import in_step
from rlhf.torch_typed import integers, numbers, run_numbers
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
        twin: Twin | None = None,
    ) -> None:
        """`temperature`: that of the rollouts; log-probs are computed at the same.

        `pretraining` adds the gradient of its texts to every update. `twin`: the second adapter, for an
        algorithm with a chase.
        """
        algorithm = models.algorithm
        self.algorithm, self.optimizer, self.world = algorithm, optimizer, world
        self.policy, self.critic, self.perception = models.policy, models.critic, models.perception
        self.models = models
        self.pretraining, self.warmup, self.twin = pretraining, Warmup(algorithm.critic), twin
        assert (twin is None) == (algorithm.chase is None)
        self.section, self.temperature = section, temperature
        exact = ("kl", "ref_logprob") if algorithm.needs_exact_kl else ()
        exact += ("kl_reverse",) if exact and algorithm.kl.forward else ()
        self.want = ("logprob", "entropy", *exact)
        self.entropy: Tensor | None = None
        """`[N]`: entropies of the last experience, from its first pass; NaN for tokens without a pass, 0
        outside the loss mask."""
        self.detail: Callable[[str], None] = lambda _: None
        """Called with the update and the microbatch that are being computed, in words."""
        self._update = ""

    def update(self, experience: Experience, *, step: int, seed: int, kl_coef: float) -> Metrics:
        """All updates of one step. Groups without signal skip the forward and count in every denominator."""
        return merge(
            [self.before(experience), *self.updates(experience, step=step, seed=seed, kl_coef=kl_coef)]
        )

    def before(self, experience: Experience) -> Metrics:
        """Metrics that are known before the first update: of the advantages and of the critic's values."""
        advantages = _advantage_metrics(experience) if self.algorithm.has_advantages else {}
        return advantages | _value_metrics(experience, self.world)

    def updates(
        self,
        experience: Experience,
        *,
        step: int,
        seed: int,
        kl_coef: float,
        done: int = 0,
        entropy: Tensor | None = None,
    ) -> Iterator[Metrics]:
        """Makes the updates of one step, one a metrics; the first `done` of them were made before, and
        measured `entropy` `[N]`.
        """
        minibatches = self.section.minibatches
        unmeasured = torch.full_like(experience.advantages, torch.nan)
        self.entropy = unmeasured if entropy is None else entropy.clone()
        total = self.section.epochs * minibatches
        for update in range(done, total):
            self._update = f"update {update + 1} of {total}"
            epoch, index = divmod(update, minibatches)
            groups = self._minibatch(experience, index, seed=seed, step=step, epoch=epoch)
            # counted over the whole run
            number = step * self.section.epochs * minibatches + update
            yield merge(self._update_once(experience, groups, number=number, step=step, kl_coef=kl_coef))

    def _update_once(
        self, experience: Experience, groups: list[int], *, number: int, step: int, kl_coef: float
    ) -> list[Metrics]:
        learned, skipped_tokens = self._with_signal(experience, groups, kl_coef)
        if not self._any_rank(bool(learned)):
            return [{"update/no_signal": Sum(1.0 / self.world.size)}]
        counts = self.counts(experience, groups)
        metrics = self.accumulate(experience, learned, counts, kl_coef)
        if self.policy_learns and self.algorithm.has_advantages:
            # skipped groups add loss 0 over their tokens
            metrics.append({"loss/policy": Mean(0.0, skipped_tokens / max(counts.tokens, 1))})
        if self.pretraining is not None and self.policy_learns:
            metrics.append(self.pretraining.accumulate(number))
        return [*metrics, self._step(step)]

    def accumulate(
        self, experience: Experience, groups: list[int], counts: Counts, kl_coef: float
    ) -> list[Metrics]:
        """Adds up the gradient of these groups' share of an update's loss; metrics of each microbatch."""
        metrics: list[Metrics] = []
        number, budget = 0, self.section.microbatch_tokens
        for name, reference, share in self.models.by_reference(experience, groups):
            # only an exact KL compares with the reference again in every pass
            reference = reference if self.models.algorithm.needs_exact_kl else None
            micros = microbatches(experience, share, budget, layout=self.policy.layout)
            for micro in in_step(micros, self.policy.model, self.world):
                number += 1
                self.detail(f"{self._update}, microbatch {number}")
                if micro is None:
                    torch.autograd.backward(self._dummy_pass(reference))
                    continue
                if self.twin is not None:
                    forward = partial(self._policy_pass, experience, micro, counts, kl_coef, reference)
                    metrics.append(self.twin.accumulate(self.algorithm, forward))
                    continue
                outputs = self._losses(experience, micro, counts, kl_coef, reference)
                torch.autograd.backward([output.loss for output in outputs])
                metrics += [output.metrics for output in outputs]
                metrics += [] if name is None else [_kl_to(name, output.metrics) for output in outputs]
        return metrics

    def _policy_pass(
        self,
        experience: Experience,
        micro: Microbatch,
        counts: Counts,
        kl_coef: float,
        reference: Policy | None,
    ) -> tuple[Tensor, LossInputs]:
        """A forward pass of the policy: its hidden states `[N, H]`, and what its loss sees."""
        hidden = self.policy.hidden(micro.packed)
        statistics = self.policy.statistics(
            micro.packed,
            temperature=self.temperature,
            want=self.want,
            reference=reference,
            hidden=hidden,
        )
        return hidden, self._loss_inputs(experience, micro, hidden, statistics, counts, kl_coef)

    def _losses(
        self,
        experience: Experience,
        micro: Microbatch,
        counts: Counts,
        kl_coef: float,
        reference: Policy | None,
    ) -> list[LossOutput]:
        """Losses of the policy, unless it is frozen, and of the critic, if there is one.

        `reference`: what an exact KL compares with; else None.
        """
        hidden, outputs = None, list[LossOutput]()
        if self.policy_learns:
            hidden, batch = self._policy_pass(experience, micro, counts, kl_coef, reference)
            outputs.append(self.algorithm.loss(batch))
        if self.critic is not None:
            assert experience.critic is not None
            index = micro.index
            targets = CriticTargets(experience.critic.values[index], experience.critic.returns[index])
            mask, sequence = experience.loss_mask[index], run_numbers(experience.sequence[index])
            where = Where(mask, sequence, experience.turn[index], counts)
            values = self.critic.values(micro.packed, hidden).to(targets.values.dtype)
            outputs.append(self.algorithm.value_loss(values, targets, where))
        return outputs

    def _dummy_pass(self, reference: Policy | None) -> list[Tensor]:
        """The passes of `_losses` with nothing in them: losses of 0 that depend on every weight.

        A rank whose microbatches are used up makes them as long as another rank, which shares the weights'
        shards, still has some.
        """
        dummies = [self.policy.dummy_pass(reference)] if self.policy_learns else []
        if self.critic is not None and (self.critic.own or not self.policy_learns):
            dummies.append(self.critic.dummy_pass())
        return dummies

    @property
    def policy_learns(self) -> bool:
        """False during the critic's warm-up."""
        return self.warmup.over

    def _step(self, step: int) -> Metrics:
        # the schedule of the policy begins when the policy begins to learn
        self.optimizer.begins = self.warmup.steps
        optimizers = {"lr": (self.optimizer, step)} if self.policy_learns else {}
        if self.critic is not None:
            optimizers["critic/lr"] = (self.critic.optimizer, step)
        metrics = step_together(optimizers, self.world)
        return metrics if self.twin is None else merge([metrics, self.twin.step(step)])

    def _loss_inputs(
        self,
        experience: Experience,
        micro: Microbatch,
        hidden: Tensor,
        statistics: TokenStats,
        counts: Counts,
        kl_coef: float,
    ) -> LossInputs:
        index, sequences = micro.index, micro.sequences.to(micro.index.device)
        logprobs, entropy = statistics.logprob, statistics.entropy
        assert logprobs is not None and entropy is not None
        if self.entropy is not None and torch.is_grad_enabled():
            # later passes of the step see a policy that has been updated: the first pass stays
            first = self.entropy[index]
            self.entropy[index] = torch.where(first.isnan(), entropy.detach().to(first.dtype), first)
        old, ref = experience.old_logprobs, statistics.ref_logprob
        if experience.ref_logprobs is not None:
            ref = experience.ref_logprobs[index]
        return LossInputs(
            logprobs=logprobs,
            entropy=entropy if self.algorithm.entropy_coef else entropy.detach(),
            exact_kl=statistics.kl,
            forward_kl=statistics.kl_reverse,
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
            contrasts=None
            if experience.contrasts is None
            else experience.contrasts.within(micro.sequences).to(index.device),
            pull=None if experience.pull is None else experience.pull[sequences],
            iterate_logprobs=None
            if experience.iterate_logprobs is None
            else experience.iterate_logprobs[index],
        )

    def _minibatch(
        self, experience: Experience, index: int, *, seed: int, step: int, epoch: int
    ) -> list[int]:
        """The groups of this rank in minibatch `index` of an epoch."""
        # shuffled by their numbers among the groups of all ranks, so every rank finds the same minibatches
        numbers = list(range(len(experience.prompts)))
        if experience.numbers is not None:
            numbers = integers(experience.numbers)
        total = 1 + max(self.world.gather(max(numbers, default=-1)))
        minibatches = minibatch_of(total, self.section.minibatches, seed=seed, step=step, epoch=epoch)
        return [group for group, number in enumerate(numbers) if minibatches[number] == index]

    def counts(self, experience: Experience, groups: list[int]) -> Counts:
        """The denominators of an update, which these groups of this rank and those of other ranks make up."""
        chosen = torch.tensor(groups, dtype=torch.long, device=self.world.device)
        num_sequences = len(experience.group)
        unmasked = torch.bincount(experience.sequence[experience.loss_mask], minlength=num_sequences)  # [S]
        unmasked = unmasked * torch.isin(experience.group, chosen)
        correct = unmasked[:0] if experience.correct is None else unmasked[experience.correct]
        own = unmasked if experience.recorded is None else unmasked[_own(experience)]
        # of the last turn of each sequence
        last = experience.loss_mask & in_last_turn(experience.turn, experience.sequence)
        of_last = torch.bincount(experience.sequence[last], minlength=num_sequences)
        of_last = of_last * torch.isin(experience.group, chosen)
        parts = [unmasked.sum(), (unmasked > 0).sum(), correct.sum(), (own > 0).sum(), of_last.sum()]
        sums = integers(self.world.all_sum(torch.stack(parts)))
        tokens, sequences, correct_tokens, sampled, last_tokens = sums
        comparisons = 0.0
        if self.algorithm.preference is not None:
            [comparisons] = numbers(self.world.all_sum(_shares(experience, groups).to(self.world.device)))
        return Counts(
            tokens=tokens,
            sequences=sequences,
            earlier_tokens=tokens - last_tokens,
            last_tokens=last_tokens,
            correct_tokens=correct_tokens,
            sampled=sampled,
            comparisons=comparisons,
        )

    def _with_signal(
        self, experience: Experience, groups: list[int], kl_coef: float
    ) -> tuple[list[int], int]:
        """Those of `groups` that have a gradient, and the number of unmasked tokens in the others."""
        mask = experience.loss_mask  # [N]
        at_zero = self.algorithm.learns_at_zero(kl_coef)
        compared = _compared(experience)
        signal = mask if at_zero else mask & (experience.advantages != 0)  # [N]
        group = experience.group[experience.sequence]  # [N]
        zeros = mask.new_zeros(len(experience.prompts), dtype=torch.long)  # [P]
        sums = torch.cat([zeros.index_add(0, group, tokens.long()) for tokens in (mask, signal)])  # [2 P]
        # the device is asked once for all groups
        counts = integers(sums)
        num_unmasked, num_signal = counts[: len(zeros)], counts[len(zeros) :]

        def has_gradient(g: int) -> bool:
            # the perception terms have one in every unmasked token behind an image, whatever the advantages
            perceives = self.perception is not None and any(experience.images[g : g + 1])
            return g in compared or (num_unmasked if perceives else num_signal)[g] > 0

        learned = [g for g in groups if has_gradient(g)]
        return learned, sum(num_unmasked[g] for g in groups) - sum(num_unmasked[g] for g in learned)

    def _any_rank(self, flag: bool) -> bool:
        return bool(self.world.all_sum(torch.tensor(int(flag), device=self.world.device)).item())


def _kl_to(name: str, metrics: Metrics) -> Metrics:
    """The KLs to the frozen model `name` among `metrics`, under names that end with it."""
    kinds = ("kl/exact", "kl/forward", "kl/ref")
    return {f"{kind}/{name}": metrics[kind] for kind in kinds if kind in metrics}


def _own(experience: Experience) -> Tensor:
    """bool `[S]`: sequences that the policy sampled."""
    assert experience.recorded is not None
    unrecorded = torch.bincount(experience.sequence[~experience.recorded], minlength=len(experience.group))
    return unrecorded == 0


def _compared(experience: Experience) -> set[int]:
    """The groups with sequences that a preference loss compares."""
    if experience.contrasts is None:
        return set()
    return set(integers(experience.group.cpu()[experience.contrasts.sequence]))


def _shares(experience: Experience, groups: Sequence[int]) -> Tensor:
    """`[1]`: the sum of the shares of the contrasts of these groups."""
    contrasts = experience.contrasts
    assert contrasts is not None
    chosen = torch.isin(experience.group.cpu()[contrasts.sequence], torch.tensor(groups, dtype=torch.long))
    # all entries of a contrast are of one group
    here = torch.zeros(len(contrasts.share)).index_fill(0, contrasts.contrast[chosen], 1.0)
    return (contrasts.share * here).sum().double().view(1)


def _advantage_metrics(experience: Experience) -> Metrics:
    """Largest advantage, and the share of sequences whose advantages are all zero: they teach nothing.

    Where the data's completions are compared, those of the policy alone have advantages (HyPO).
    """
    informative = torch.bincount(
        experience.sequence, weights=(experience.advantages != 0).double(), minlength=len(experience.group)
    )
    largest = experience.advantages.abs().max().item() if len(experience.advantages) else 0.0
    if experience.contrasts is not None and experience.recorded is not None:
        informative = informative[_own(experience)]
    num_zero = int((informative == 0).sum())
    return {
        "advantage/zero_fraction": Mean(float(num_zero), float(len(informative))),
        "advantage/abs_max": Max(largest),
    }


def _value_metrics(experience: Experience, world: World) -> Metrics:
    """Share of the returns' variance that the critic explained before it learned from this experience."""
    if experience.critic is None:
        return {}
    share = explained_variance(
        experience.critic.values, experience.critic.returns, experience.loss_mask, all_sum=world.all_sum
    )
    return {"critic/explained_variance": Mean(share)} if math.isfinite(share) else {}
