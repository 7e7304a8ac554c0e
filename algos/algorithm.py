"""An algorithm is a value: advantage x ratio x surrogate x reduction x KL x extra terms.

    loss = reduce(w_t * surrogate_t) + kl_coef * reduce(kl_t) - entropy_coef * reduce(entropy_t)
           + imitation_coef * mean of -logprob over the tokens of correct completions
           + the perception terms of prompts with images (`rlhf.algos.perception`)
           + the loss of comparisons (`rlhf.algos.preference.losses`)

and, if there is a critic, + critic.coef * reduce(value_loss_t). w_t is the weight for the mismatch between
learner and engine, a constant. Differences from the papers: 1. that weight, which most papers leave out, is
on by default (token_tis, 2); 2. it multiplies neither the KL nor the entropy nor the imitation term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.algos.advantage import Advantage, nothing
from rlhf.algos.critic import RAW, CriticLoss, RewardScaling
from rlhf.algos.kl import ESTIMATORS, KL, NO_KL, k3
from rlhf.algos.perception import Perception
from rlhf.algos.preference.chase import Chase
from rlhf.algos.preference.losses import Preference, contrast_loss
from rlhf.algos.prompt_temperature import PromptTemperature
from rlhf.algos.ratio import TOKEN_TIS, Mismatch, Ratio, mismatch_k3
from rlhf.algos.reduction import Reduction, Where
from rlhf.algos.shaping import EVERYTHING, Selection, unshaped
from rlhf.algos.surrogate import Surrogate
from rlhf.metrics import ExpMean, Max, Mean, Metrics
from rlhf.tensors.transfer import numbers
from rlhf.types import CriticTargets, LossInputs


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The scalar to differentiate, and partial metrics of this microbatch."""

    loss: Tensor
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class FromData:
    """What an algorithm that may learn from data asks of completions whose log-probs nobody recorded."""

    pointwise: bool = False
    """The weight of a completion does not depend on the others of its group: it may be drawn without them."""
    anchor: Literal["old", "reference"] = "old"
    """What the ratio compares the policy with: itself before the update, or the reference, which stands for
    whatever made the completions (A-LoL)."""
    needs_prompt_value: bool = False
    """Rewards are compared with a frozen value of the prompt (`AdvantageInputs.prompt_values`)."""
    prompt_temperature: PromptTemperature | None = None
    """When given, each prompt has a temperature of its own (`AdvantageInputs.temperature_factors`)."""
    silent_at_zero: bool = True
    """A token whose advantage is 0 has no policy gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Everything in which one method differs from another.

    Example, GRPO without a KL: `Algorithm(advantage=per_sequence(group_normalize), ratio=token_ratio,
    surrogate=partial(clip, low=0.2, high=0.2), reduction=sequence_mean_token_mean)`.
    """

    advantage: Advantage
    ratio: Ratio
    surrogate: Surrogate
    reduction: Reduction
    kl: KL = NO_KL
    mismatch: Mismatch = TOKEN_TIS
    entropy_coef: float = 0.0
    """Weight of the entropy, which is rewarded where this is above 0."""
    imitation_coef: float = 0.0
    """Weight of the negative log-likelihood of correct completions (VAPO's positive-example loss)."""
    critic: CriticLoss | None = None
    """What values are for and how they are learned. None: there is no critic."""
    perception: Perception | None = None
    """The terms for prompts with images (PAPO); they go with any algorithm."""
    preference: Preference | None = None
    """The loss of comparisons of completions (DPO). None: there is none."""
    shape_reward: Callable[[float, int], float] = unshaped
    """Reward and completion length in tokens -> the reward that is compared."""
    reward_scaling: RewardScaling = RAW
    """How rewards, after `shape_reward`, are scaled by those of all steps so far."""
    selection: Selection = EVERYTHING
    """Which of the sampled groups and completions are learned from."""
    from_data: FromData | None = None
    """For an algorithm that may learn from data. None: only completions of the policy itself will do."""
    objectives: tuple[str, ...] = ()
    """Names of objectives that the advantage reads; some completion of each step is to have each of them."""
    compares_steps: bool = False
    """Whether the advantage compares the rewards of steps; some completion of each training step is to have
    some."""
    scores_samples: bool = True
    """Whether samples are learned from by their rewards; not where all labels are the data's (HyPO)."""
    cautions: tuple[str, ...] = ()
    """What its paper advises against in these settings; printed when a run starts."""

    @property
    def needs_reference(self) -> bool:
        compared = self.preference is not None and "reference" in self.preference.uses
        return self.kl.coef > 0 or self._anchored_at_reference or compared

    @property
    def needs_iterate(self) -> bool:
        """Whether completions are compared with the policy of the last iteration."""
        return self.preference is not None and "iterate" in self.preference.uses

    @property
    def has_advantages(self) -> bool:
        """Whether tokens are learned by their advantages: not where a preference loss is all there is."""
        return self.advantage is not nothing

    @property
    def needs_exact_kl(self) -> bool:
        return self.kl.coef > 0 and self.kl.estimator == "exact"

    @property
    def chase(self) -> Chase | None:
        """How two copies of the policy learn together. None: there is one."""
        return None if self.preference is None else self.preference.chase

    @property
    def needs_rewards(self) -> bool:
        """Whether sampled completions have to have rewards."""
        return self.scores_samples and self._has_other_losses

    @property
    def has_teacher(self) -> bool:
        """Whether the reference is a teacher: the only thing that is learned from."""
        return self.kl.coef > 0 and not self._has_other_losses

    @property
    def _has_other_losses(self) -> bool:
        """Whether there is more than the KL to the reference."""
        compared = self.preference is not None or self.critic is not None
        return self.has_advantages or compared or self.imitation_coef != 0

    @property
    def pointwise(self) -> bool:
        """Whether a completion may be learned from without the others of its group."""
        return self.from_data is not None and self.from_data.pointwise

    @property
    def needs_prompt_value(self) -> bool:
        return self.from_data is not None and self.from_data.needs_prompt_value

    @property
    def prompt_temperature(self) -> PromptTemperature | None:
        return None if self.from_data is None else self.from_data.prompt_temperature

    @property
    def _anchored_at_reference(self) -> bool:
        return self.from_data is not None and self.from_data.anchor == "reference"

    def learns_at_zero(self, kl_coef: float) -> bool:
        """Whether a token whose advantage is 0 has a gradient, from another term of the loss."""
        return (
            self.critic is not None
            or self.imitation_coef != 0
            or self.entropy_coef != 0
            or (kl_coef != 0 and self.kl.placement == "loss")
            or (self.from_data is not None and not self.from_data.silent_at_zero)
        )

    def token_penalty(self, old_logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float) -> Tensor:
        """What the KL subtracts from each token's reward, `[N]`; only with `kl.placement` "reward"."""
        assert self.kl.placement == "reward"
        return kl_coef * ESTIMATORS[self.kl.estimator](old_logprobs, ref_logprobs).detach()

    def value_loss(self, values: Tensor, targets: CriticTargets, where: Where) -> LossOutput:
        """The critic's loss of one microbatch, as its share of the whole update's loss.

        `values` `[N]` carry gradient.
        """
        assert self.critic is not None
        values = values.masked_fill(~where.mask, 0.0)
        targets = CriticTargets(*(x.masked_fill(~where.mask, 0.0) for x in (targets.values, targets.returns)))
        loss = self.reduction(self.critic.loss(values, targets), where)
        return LossOutput(self.critic.coef * loss, _critic_metrics(values, targets, where, loss))

    def loss(self, batch: LossInputs) -> LossOutput:
        """The policy's loss of one microbatch, as its share of the whole update's loss: shares add up."""
        batch = _silence(batch)
        mask, sequence = batch.loss_mask, batch.sequence
        where = Where(mask, sequence, batch.turn, batch.counts)

        def reduce(x: Tensor) -> Tensor:
            return self.reduction(x, where)

        mismatch = _log_mismatch(batch)
        weight = self.mismatch.weight(mismatch, mask, sequence)
        loss, learned = batch.logprobs.new_zeros(()), None
        if self.has_advantages:
            ratio = self.ratio(batch.logprobs, self._anchor_logprobs(batch), mask, sequence)
            tokens = self.surrogate(batch.logprobs, ratio, batch.advantages)
            loss = reduce(weight * tokens.loss)
            learned = Learned(loss.detach(), ratio.detach(), tokens.metrics)
        if self.kl.coef and self.kl.placement == "loss":
            loss = loss + batch.kl_coef * reduce(self._kl(batch))
        if self.entropy_coef:
            loss = loss - self.entropy_coef * reduce(batch.entropy)
        if self.imitation_coef:
            loss = loss + self.imitation_coef * _imitation(batch)
        metrics = _policy_metrics(batch, learned, mismatch, weight)
        if self.preference is not None:
            compared, more = contrast_loss(batch, self.preference)
            loss, metrics = loss + compared, metrics | more
        if self.perception is not None and batch.perception is not None:
            terms, more = self.perception.loss(batch, reduce)
            loss, metrics = loss + terms, metrics | more
        return LossOutput(loss, metrics)

    def _anchor_logprobs(self, batch: LossInputs) -> Tensor:
        if not self._anchored_at_reference:
            return batch.old_logprobs
        assert batch.ref_logprobs is not None
        return batch.ref_logprobs

    def _kl(self, batch: LossInputs) -> Tensor:
        if self.kl.estimator == "exact":
            return self._exact_kl(batch.exact_kl, batch.forward_kl)
        assert batch.ref_logprobs is not None
        return ESTIMATORS[self.kl.estimator](batch.logprobs, batch.ref_logprobs)

    def _exact_kl(self, reverse: Tensor | None, forward: Tensor | None) -> Tensor:
        """The mix of both directions, `[N]`; one with the share 0 is left out, and so costs no gradient."""
        share = self.kl.forward
        assert reverse is not None
        if share == 0:
            return reverse
        assert forward is not None
        return forward if share == 1 else (1 - share) * reverse + share * forward


def _imitation(batch: LossInputs) -> Tensor:
    """-logprob, mean over the tokens of correct completions of the whole update (VAPO, arXiv:2504.05118)."""
    assert batch.correct is not None
    imitated = batch.loss_mask & batch.correct  # [N]
    return -batch.logprobs.masked_fill(~imitated, 0.0).sum() / max(batch.counts.correct_tokens, 1)


def _silence(batch: LossInputs) -> LossInputs:
    """Zeros outside the loss mask, so that no value there, not even NaN, reaches the loss or a gradient."""

    def quiet(x: Tensor) -> Tensor:
        return x.masked_fill(~batch.loss_mask, 0.0)

    return replace(
        batch,
        logprobs=quiet(batch.logprobs),
        entropy=quiet(batch.entropy),
        exact_kl=None if batch.exact_kl is None else quiet(batch.exact_kl),
        forward_kl=None if batch.forward_kl is None else quiet(batch.forward_kl),
        old_logprobs=quiet(batch.old_logprobs),
        rollout_logprobs=quiet(batch.rollout_logprobs),
        ref_logprobs=None if batch.ref_logprobs is None else quiet(batch.ref_logprobs),
        advantages=quiet(batch.advantages),
    )


def _log_mismatch(batch: LossInputs) -> Tensor:
    """log old policy - log engine; 0, which is no correction, where the engine's log-prob is not known."""
    difference = batch.old_logprobs - batch.rollout_logprobs
    return difference if batch.recorded is None else difference.masked_fill(~batch.recorded, 0.0)


@torch.no_grad()
def _critic_metrics(values: Tensor, targets: CriticTargets, where: Where, loss: Tensor) -> Metrics:
    """Metrics of the critic's loss in one microbatch; `values` are `[N]`, `loss` is a number."""
    mask = where.mask
    [read] = numbers(
        {
            "tokens": mask.sum().to(loss.dtype),
            "loss": loss.detach(),
            "values": values.masked_fill(~mask, 0.0).sum(),
            "returns": targets.returns.masked_fill(~mask, 0.0).sum(),
        }
    )
    return {
        # shares of an update's loss add up to it, and their weights to 1
        "critic/loss": Mean(read["loss"], read["tokens"] / max(where.counts.tokens, 1)),
        "critic/values": Mean(read["values"], read["tokens"]),
        "critic/returns": Mean(read["returns"], read["tokens"]),
    }


class Learned(NamedTuple):
    """The part of the loss that learns tokens by their advantages, without gradient."""

    loss: Tensor
    """A number."""
    ratio: Tensor  # [N]
    metrics: Mapping[str, Tensor]
    """The surrogate's own, each `[N]`."""


@torch.no_grad()
def _policy_metrics(batch: LossInputs, learned: Learned | None, mismatch: Tensor, weight: Tensor) -> Metrics:
    """Metrics of the policy's loss in one microbatch.

    `mismatch` is log old policy - log engine, `weight` the correction for it, both `[N]`; `learned` is None
    for an algorithm that learns no token by an advantage.
    """
    means = _token_metrics(batch, mismatch, weight)
    maxima = {"mismatch/ratio_max": mismatch.clamp(-20.0, 20.0).exp()}
    if learned is not None:
        means |= {"ratio/mean": learned.ratio, "kl/old": batch.old_logprobs - batch.logprobs}
        means |= learned.metrics
        maxima["ratio/max"] = learned.ratio
    unmasked = batch.loss_mask
    recorded = unmasked if batch.recorded is None else unmasked & batch.recorded

    def masked(name: str, x: Tensor) -> Tensor:
        return x.masked_fill(~(recorded if _of_samples(name) else unmasked), 0.0)

    dtype = batch.logprobs.dtype
    read, sums, tops = numbers(
        {"unmasked": unmasked.sum().to(dtype), "recorded": recorded.sum().to(dtype)}
        | ({} if learned is None else {"loss": learned.loss}),
        {name: masked(name, x.to(dtype)).sum() for name, x in means.items()},
        {name: masked(name, x).max() for name, x in maxima.items()},
    )
    metrics: Metrics = {
        name: Mean(total, read["recorded" if _of_samples(name) else "unmasked"])
        for name, total in sums.items()
    }
    metrics |= {name: Max(top) for name, top in tops.items()}
    if read["unmasked"] and not read["recorded"]:
        metrics = {name: value for name, value in metrics.items() if not _of_samples(name)}
    metrics["perplexity"] = ExpMean(sums["perplexity"], read["unmasked"])
    if learned is not None:
        # shares of an update's loss add up to it, and their weights to 1
        metrics["loss/policy"] = Mean(read["loss"], read["unmasked"] / max(batch.counts.tokens, 1))
    return metrics


def _token_metrics(batch: LossInputs, mismatch: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What is averaged over tokens, each `[N]`."""
    means = {
        "entropy": batch.entropy,
        "perplexity": -batch.logprobs,
        "mismatch/k3": mismatch_k3(mismatch),
        "mismatch/weight": weight,
        "mismatch/weight_squared": weight.square(),
        "mismatch/masked_fraction": weight == 0,
    }
    if batch.ref_logprobs is not None:
        means["kl/ref"] = k3(batch.logprobs, batch.ref_logprobs)
    if batch.exact_kl is not None:
        means["kl/exact"] = batch.exact_kl
    if batch.forward_kl is not None:
        means["kl/forward"] = batch.forward_kl
    return means


def _of_samples(name: str) -> bool:
    """Whether a metric says something of tokens that an engine sampled, and nothing of those of data.

    A mismatch needs the engine's log-prob; the estimate k3 of the KL to the reference needs samples of the
    policy.
    """
    return name.startswith("mismatch/") or name == "kl/ref"
