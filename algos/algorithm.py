"""An algorithm is a value: advantage x ratio x surrogate x reduction x KL x extra terms.

    loss = reduce(w_t * surrogate_t) + kl_coef * reduce(kl_t) - entropy_coef * reduce(entropy_t)

with w_t the weight for the mismatch between learner and engine, a constant. Differences from the papers: 1.
that weight, which most papers leave out, is on by default (token_tis, 2); 2. it does not multiply the KL, nor
the entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf.algos import kl as estimators
from rlhf.algos.advantage import Advantage
from rlhf.algos.kl import AdaptiveKL
from rlhf.algos.ratio import CORRECTIONS, Ratio, mismatch_k3
from rlhf.algos.reduction import Reduction
from rlhf.algos.shaping import keep_all, unshaped
from rlhf.algos.surrogate import Surrogate
from rlhf.metrics import Max, Mean, Metrics
from rlhf.types import Group, LossInputs

ESTIMATORS = {"k1": estimators.k1, "k2": estimators.k2, "k3": estimators.k3, "k3+": estimators.k3_plus}


@dataclass(frozen=True, slots=True)
class KL:
    """What staying near the reference is worth, and how the distance is measured (`rlhf.algos.kl`)."""

    coef: float = 0.0
    """0: no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3", "k3+", "exact"] = "k3"
    placement: Literal["loss", "reward"] = "loss"
    """In the loss it has a gradient; in the reward it is taken off each token before any advantage."""
    target: float | None = None
    """Nats a token; when given, a controller moves the coefficient so that the KL stays near it."""
    horizon: int = 10_000
    """Trajectories over which the controller acts."""

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"kl.coef must be 0 or more, got {self.coef}")
        if self.target is not None and not (self.target > 0 and self.coef > 0):
            raise ValueError(
                f"kl.target needs target > 0 and a start kl.coef > 0, got {self.target}, {self.coef}"
            )
        if self.horizon < 1:
            raise ValueError(f"kl.horizon must be 1 or more, got {self.horizon}")
        if self.coef and self.estimator == "k1" and self.placement == "loss":
            raise ValueError(
                "kl.estimator k1 in the loss has no expected gradient; use k2 or k3, or placement reward"
            )
        if self.coef and self.estimator == "exact" and self.placement == "reward":
            raise ValueError("kl.estimator exact belongs in the loss; in the reward use k1")

    @property
    def controller(self) -> AdaptiveKL | None:
        """The adaptive controller at its start, if the coefficient is to move."""
        return None if self.target is None else AdaptiveKL(self.coef, self.target, self.horizon)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The correction for an engine whose probabilities differ from the learner's (`rlhf.algos.ratio`)."""

    kind: Literal["none", "token_tis", "sequence_tis", "icepop", "sequence_mask", "geometric", "k2", "k3"] = (
        "token_tis"
    )
    low: float | None = None
    """None: the usual bound of the kind."""
    high: float | None = None

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 <= low <= high:
            raise ValueError(f"mismatch.{self.kind} needs 0 <= low <= high, got low {low}, high {high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high, the usual ones where none was given."""
        _, low, high = CORRECTIONS[self.kind]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def weight(self, log_ratio: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
        """The weight of each token's loss `[N]`, from log old policy - log engine."""
        return CORRECTIONS[self.kind][0](log_ratio, mask, sequence, *self.bounds).detach()


NO_KL = KL()
TOKEN_TIS = Mismatch()


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The scalar to differentiate, and partial metrics of this microbatch."""

    loss: Tensor
    metrics: Metrics


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
    """Above 0 a high entropy is rewarded."""
    shape_reward: Callable[[float, int], float] = unshaped
    """Reward and completion length in tokens -> the reward that is compared."""
    keep: Callable[[Group], bool] = keep_all
    """Which groups are learned from, by their rewards before `shape_reward`."""
    refill: int = 0
    """How many more rounds of sampling may replace the groups that were not kept."""
    drop_truncated: bool = False
    """Completions cut at the length limit are compared, but not learned from (overlong filtering)."""

    @property
    def needs_reference(self) -> bool:
        return self.kl.coef > 0

    @property
    def needs_exact_kl(self) -> bool:
        return self.kl.coef > 0 and self.kl.estimator == "exact"

    def token_penalty(self, old_logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float) -> Tensor:
        """What the KL takes off each token's reward `[N]`; only with `kl.placement` "reward"."""
        assert self.kl.placement == "reward"
        return kl_coef * ESTIMATORS[self.kl.estimator](old_logprobs, ref_logprobs).detach()

    def loss(self, batch: LossInputs) -> LossOutput:
        """The loss of one microbatch, as its share of the whole update's loss: shares add up."""
        batch = _silence(batch)
        mask, sequence = batch.loss_mask, batch.sequence

        def reduce(x: Tensor) -> Tensor:
            return self.reduction(x, mask, sequence, batch.counts)

        ratio = self.ratio(batch.logprobs, batch.old_logprobs, mask, sequence)
        weight = self.mismatch.weight(batch.old_logprobs - batch.rollout_logprobs, mask, sequence)
        tokens = self.surrogate(batch.logprobs, ratio, batch.advantages)
        policy = reduce(weight * tokens.loss)
        loss = policy
        if self.needs_reference and self.kl.placement == "loss":
            loss = loss + batch.kl_coef * reduce(self._kl(batch))
        if self.entropy_coef:
            loss = loss - self.entropy_coef * reduce(batch.entropy)
        return LossOutput(loss, _report(batch, policy.detach(), ratio.detach(), weight, tokens.metrics))

    def _kl(self, batch: LossInputs) -> Tensor:
        if self.kl.estimator == "exact":
            assert batch.exact_kl is not None
            return batch.exact_kl
        assert batch.ref_logprobs is not None
        return ESTIMATORS[self.kl.estimator](batch.logprobs, batch.ref_logprobs)


def _silence(batch: LossInputs) -> LossInputs:
    """Zeros outside the loss mask: what stands there, NaN even, reaches neither the loss nor a gradient."""

    def quiet(x: Tensor) -> Tensor:
        return x.masked_fill(~batch.loss_mask, 0.0)

    return replace(
        batch,
        logprobs=quiet(batch.logprobs),
        entropy=quiet(batch.entropy),
        exact_kl=None if batch.exact_kl is None else quiet(batch.exact_kl),
        old_logprobs=quiet(batch.old_logprobs),
        rollout_logprobs=quiet(batch.rollout_logprobs),
        ref_logprobs=None if batch.ref_logprobs is None else quiet(batch.ref_logprobs),
        advantages=quiet(batch.advantages),
    )


@torch.no_grad()
def _report(
    batch: LossInputs, policy: Tensor, ratio: Tensor, weight: Tensor, extra: dict[str, Tensor]
) -> Metrics:
    """Metrics of one microbatch; all numbers leave the device in one transfer."""
    mismatch = batch.old_logprobs - batch.rollout_logprobs
    means = {
        "entropy": batch.entropy,
        "kl/old": batch.old_logprobs - batch.logprobs,
        "mismatch/k3": mismatch_k3(mismatch),
        "mismatch/weight": weight,
        "mismatch/weight_squared": weight.square(),
        "mismatch/masked_fraction": weight == 0,
        **extra,
    }
    if batch.ref_logprobs is not None:
        means["kl/ref"] = estimators.k3(batch.logprobs, batch.ref_logprobs)
    if batch.exact_kl is not None:
        means["kl/exact"] = batch.exact_kl
    largest = {"ratio/max": ratio, "mismatch/ratio_max": mismatch.clamp(-20.0, 20.0).exp()}
    mask = batch.loss_mask
    sums = [x.to(ratio.dtype).masked_fill(~mask, 0.0).sum() for x in means.values()]
    tops = [x.masked_fill(~mask, 0.0).max() for x in largest.values()]
    at_once = torch.stack([mask.sum().to(ratio.dtype), policy, *sums, *tops]).cpu()
    count, loss, *numbers = (float(x) for x in at_once.unbind())
    metrics: Metrics = {name: Mean(total, count) for name, total in zip(means, numbers, strict=False)}
    metrics |= {name: Max(top) for name, top in zip(largest, numbers[len(means) :], strict=True)}
    # shares of an update's loss add up to it, and their weights to 1
    metrics["loss/policy"] = Mean(loss, count / max(batch.counts.tokens, 1))
    return metrics
