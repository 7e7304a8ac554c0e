"""Algorithms that imitate completions of any origin, each with a weight: SFT, best of, A-LoL, AWR and others.

The loss of each is `-weight * logprob`, with a weight that is never negative: no completion is made less
likely, so it does not matter what made the completions.

    sft                1                                r_lol          max(R, 0) * ratio to the reference
    best_of            1 for the best of its group      a_lol          max(R - V, 0) * ratio to the reference
    weighted_bc        max(R, 0)                        awr            min(exp(A / temperature), max_weight)
    r_gold             max(R, 0) * max(p, 0.1)

The functions here turn scored sequences `[S]` into such weights; the algorithms are at the end.

Differences from the papers and codes: 1. A-LoL's ratios are those of `rlhf.algos.ratio`, its clip CISPO's; 2.
the reward baselines (R-LoL, weighted behaviour cloning, reward GOLD) count a negative reward as 0; 3. AWR's
standardisation is over sequences, unbiased, and its weights have the mean 1 over the completions of an
experience unless `normalize` is off; 4. `awr` uses the advantage of the whole completion, where the paper
uses TD(lambda); `awr_token` uses that, and its critic learns along with the policy, not before it.

`distill` imitates a teacher, token by token, in place of completions, and needs no rewards:

    (1 - kl.forward) KL(policy || teacher) + kl.forward KL(teacher || policy), mean over tokens

exact, over the whole vocabulary, at `rollout.temperature`, by which the logits of both models are divided.
Generalised knowledge distillation (GKD, arXiv:2306.13649) has the same two ends; in TRL's GKDTrainer
`kl.forward` 1 is "beta = 0" and `kl.forward` 0 is "beta = 1". What differs: 1. between the ends is the sum of
both KLs, not the generalised Jensen-Shannon divergence: its mixture of the two distributions needs the
normalisers of both before the first token of the vocabulary is read, which is a second sweep over the logits;
2. the default is the reverse KL, TRL has beta = 0.5; 3. the mean is over the tokens of the whole update, as
in TRL; the paper's is over the tokens of each completion, then over completions; 4. TRL scores at the
temperature that it samples with too, by default 0.9; 5. the paper's lambda, the share of completions that the
policy samples, is `data.mode` with `data.mix`. As in the paper there is no gradient through the sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlhf.algos import surrogate
from rlhf.algos.advantage import (
    Advantage,
    group_center,
    leave_one_out,
    nothing,
    to_tokens,
    whiten,
    without_penalty,
)
from rlhf.algos.algorithm import KL, NO_KL, Algorithm, FromData, Mismatch
from rlhf.algos.critic import CriticLoss
from rlhf.algos.prompt_temperature import PromptTemperature
from rlhf.algos.ratio import product_ratio, token_ratio
from rlhf.algos.reduction import sequence_mean_token_sum, token_mean
from rlhf.algos.weighted import awr_weights
from rlhf.types import AdvantageInputs

NO_MISMATCH = Mismatch("none")
EXACT_KL = KL(coef=1.0, estimator="exact")
AWR_CRITIC = CriticLoss(lam=0.95, value_clip=None)
A_LOL = FromData(pointwise=True, anchor="reference", needs_prompt_value=True)

Baseline = Literal["none", "group_mean", "leave_one_out", "prompt_value"]
Compare = Callable[[AdvantageInputs], Tensor]
"""How much better each sequence was than expected, `[S]`; NaN where it has no reward."""


def above_prompt_value(inputs: AdvantageInputs) -> Tensor:
    """R - V(prompt), with V frozen (A-LoL, arXiv:2305.14718)."""
    assert inputs.prompt_values is not None, "the algorithm needs prompt values"
    return without_penalty(inputs) - inputs.prompt_values


COMPARE: dict[Baseline, Compare] = {
    "none": without_penalty,
    "group_mean": lambda inputs: group_center(without_penalty(inputs), inputs.group),
    "leave_one_out": lambda inputs: leave_one_out(without_penalty(inputs), inputs.group),
    "prompt_value": above_prompt_value,
}


def alike(inputs: AdvantageInputs) -> Tensor:
    """1 for every completion (supervised fine-tuning)."""
    return torch.ones_like(inputs.rewards)


def positive_part(compare: Compare) -> Advantage:
    """max(A, 0) for all tokens of a sequence, with A from `compare`."""

    def advantage(inputs: AdvantageInputs) -> Tensor:
        return to_tokens(compare(inputs).nan_to_num(nan=0.0).clamp(min=0.0), inputs)

    return advantage


def best_of_group(compare: Compare) -> Advantage:
    """1 for the best of each group (the first of equals) if its A, from `compare`, is above 0; else 0."""

    def advantage(inputs: AdvantageInputs) -> Tensor:
        rewards = without_penalty(inputs).nan_to_num(nan=-torch.inf)
        index = torch.arange(len(rewards), device=rewards.device)
        top = torch.full_like(rewards, -torch.inf).scatter_reduce(0, inputs.group, rewards, "amax")
        # of sequences with their group's top reward the index, of all others one past the last
        place = torch.where(rewards == top[inputs.group], index, len(rewards))
        first = torch.full_like(index, len(rewards)).scatter_reduce(0, inputs.group, place, "amin")
        best = (first[inputs.group] == index) & (compare(inputs) > 0)
        return to_tokens(best.to(rewards.dtype), inputs)

    return advantage


@dataclass(frozen=True, slots=True)
class Exponential:
    """min(exp(A / temperature), max_weight) (AWR, arXiv:1910.00177 eq. 10)."""

    temperature: float
    max_weight: float
    standardize: bool
    """First A is centred and divided by its standard deviation, over the sequences of all ranks."""
    normalize: bool
    """Weights are divided by their mean, which makes the learning rate independent of the temperature."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.max_weight <= 0:
            raise ValueError(
                f"temperature and max_weight must be above 0, got {self.temperature}, {self.max_weight}"
            )

    def by_sequence(self, compare: Compare) -> Advantage:
        """One weight for all tokens of a sequence.

        `inputs.temperature_factors`, if given, multiply the temperature.
        """
        exponents = self.exponents(compare)

        def advantage(inputs: AdvantageInputs) -> Tensor:
            exponent = exponents(inputs)
            if inputs.temperature_factors is not None:
                exponent = exponent / inputs.temperature_factors
            weights = self._weights(exponent, ~inputs.rewards.isnan(), inputs.all_sum)
            return to_tokens(weights.to(inputs.rewards.dtype), inputs)

        return advantage

    def by_token(self, compare: Advantage) -> Advantage:
        """A weight for each token, from the token's own A."""

        def advantage(inputs: AdvantageInputs) -> Tensor:
            exponent = self._exponent(compare(inputs), inputs.loss_mask, inputs.all_sum)
            weights = self._weights(exponent, inputs.loss_mask, inputs.all_sum)
            return weights.to(inputs.token_penalty.dtype)

        return advantage

    def exponents(self, compare: Compare) -> Compare:
        """A / temperature of each sequence, with A standardised if `standardize`."""
        return lambda inputs: self._exponent(compare(inputs), ~inputs.rewards.isnan(), inputs.all_sum)

    def _exponent(self, compared: Tensor, known: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
        if self.standardize:
            compared = whiten(compared, known, all_sum=all_sum, eps=1e-10)
        return compared / self.temperature

    def _weights(self, exponent: Tensor, known: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
        weights = awr_weights(exponent, max_weight=self.max_weight).masked_fill(~known, 0.0)
        return weights / _mean(weights, known, all_sum) if self.normalize else weights


def _mean(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
    total, count = all_sum(torch.stack([x.sum().double(), mask.sum().double()])).unbind()
    return total / count.clamp(min=1)


# laid out by hand: one algorithm is one short paragraph
# fmt: off


def sft(
    *, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Supervised fine-tuning: every completion has weight 1, whatever its reward."""
    return Algorithm(
        advantage=positive_part(alike),
        ratio=token_ratio,
        surrogate=surrogate.reinforce,
        reduction=token_mean,
        from_data=FromData(pointwise=True),
        kl=kl, mismatch=mismatch, entropy_coef=entropy_coef,
    )


def best_of(
    *, baseline: Baseline = "none",
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Fine-tuning on the best of each group if it is above `baseline` (as A2PR, arXiv:2405.19909)."""
    return replace(
        sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef),
        advantage=best_of_group(COMPARE[baseline]),
        from_data=FromData(needs_prompt_value=baseline == "prompt_value"),
    )


def weighted_bc(
    *, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Behaviour cloning, each completion weighted by its reward (a baseline of arXiv:2305.14718)."""
    base = sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=positive_part(without_penalty), reduction=sequence_mean_token_sum)


def r_gold(
    *, floor: float = 0.1,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """GOLD with the completion's reward (arXiv:2009.07839; a baseline of arXiv:2305.14718)."""
    base = weighted_bc(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, surrogate=partial(surrogate.gold, floor=floor))


def r_lol(
    *, clip: float = 0.9, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """A-LoL with the reward in place of the advantage, arXiv:2305.14718."""
    base = a_lol(clip=clip, kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=positive_part(without_penalty),
                   from_data=replace(A_LOL, needs_prompt_value=False))


def a_lol(
    *, clip: float = 0.9, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Advantage-leftover-lunch RL: a completion is one action, arXiv:2305.14718."""
    base = a_lol_ref_free(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    weight = partial(surrogate.cispo, low=clip, high=clip)
    return replace(base, ratio=product_ratio, surrogate=weight, from_data=A_LOL)


def a_lol_seq(
    *, clip: float = 0.9, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """A-LoL with a ratio for each token, arXiv:2305.14718 (its "sequence" variant)."""
    return replace(a_lol(clip=clip, kl=kl, mismatch=mismatch, entropy_coef=entropy_coef), ratio=token_ratio)


def a_lol_ref_free(
    *, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """A-LoL without a ratio, and so without a reference, arXiv:2305.14718."""
    base = weighted_bc(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=positive_part(above_prompt_value),
                   from_data=FromData(pointwise=True, needs_prompt_value=True))


def a_lol_kl(
    *, ratio_penalty: float = 0.0,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Reference-free A-LoL plus `ratio_penalty` log(policy / reference) of the data, arXiv:2305.14718."""
    base = a_lol_ref_free(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, ratio=token_ratio,
                   surrogate=partial(surrogate.reinforce_against, coef=ratio_penalty),
                   from_data=replace(A_LOL, silent_at_zero=ratio_penalty == 0.0))


def awr(
    *, temperature: float = 1.0, max_weight: float = 20.0, baseline: Baseline = "leave_one_out",
    standardize: bool = True, normalize: bool = True, divergence: float | None = None,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Advantage-weighted regression with a completion as one action, arXiv:1910.00177."""
    weigh, compare = Exponential(temperature, max_weight, standardize, normalize), COMPARE[baseline]
    base = sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    picked = None if divergence is None else PromptTemperature(divergence, weigh.exponents(compare))
    data = FromData(pointwise=baseline in POINTWISE, needs_prompt_value=baseline == "prompt_value",
                    prompt_temperature=picked)
    return replace(base, advantage=weigh.by_sequence(compare), from_data=data)


def awr_token(
    *, temperature: float = 1.0, max_weight: float = 20.0, critic: CriticLoss = AWR_CRITIC,
    standardize: bool = True, normalize: bool = True,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Advantage-weighted regression with a token as an action and a critic, arXiv:1910.00177."""
    weigh = Exponential(temperature, max_weight, standardize, normalize)
    return replace(sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef),
                   advantage=weigh.by_token(critic.advantages), critic=critic)


def distill(*, kl: KL = EXACT_KL, entropy_coef: float = 0.0) -> Algorithm:
    """Distillation: nothing but the KL to the reference, which is the teacher, arXiv:2306.13649."""
    if not kl.coef or kl.placement != "loss":
        raise ValueError(
            "distill learns from the KL to its teacher alone: it needs kl.coef above 0 and kl.placement "
            f"loss, got {kl.coef:g} and {kl.placement}"
        )
    data = FromData(pointwise=True, silent_at_zero=False)
    return replace(sft(kl=kl, entropy_coef=entropy_coef), advantage=nothing, from_data=data)


# fmt: on

POINTWISE: tuple[Baseline, ...] = ("none", "prompt_value")

IMITATION: dict[str, Callable[..., Algorithm]] = {
    "sft": sft,
    "best_of": best_of,
    "weighted_bc": weighted_bc,
    "r_gold": r_gold,
    "r_lol": r_lol,
    "a_lol": a_lol,
    "a_lol_seq": a_lol_seq,
    "a_lol_ref_free": a_lol_ref_free,
    "a_lol_kl": a_lol_kl,
    "awr": awr,
    "awr_token": awr_token,
    "distill": distill,
}
