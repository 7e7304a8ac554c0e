"""Imitation of completions that are already there: what each weighs, from A-LoL to weighted regression.

All of them are `-weight * logprob`, with a weight that is never negative: nothing is unlearned, so it does
not matter who made the completions.

    sft                1                                r_lol          max(R, 0) * ratio to the reference
    best_of            1 for the best of its group      a_lol          max(R - V, 0) * ratio to the reference
    weighted_bc        max(R, 0)                        awr            min(exp(A / temperature), max_weight)
    r_gold             max(R, 0) * max(p, 0.1)

The functions here turn scored sequences `[S]` into such weights; those in the table are at the end.

Differences from the papers and codes: 1. A-LoL's ratios are those of `rlhf.algos.ratio`, its clip CISPO's; 2.
the reward baselines (R-LoL, weighted behaviour cloning, reward GOLD) take a negative reward for 0; 3. AWR's
standardisation is over sequences, unbiased, and its weights have the mean 1 over the completions of an
experience unless `normalize` is off; 4. AWR's advantage is that of the whole completion, where the paper has
TD(lambda).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlhf.algos import surrogate
from rlhf.algos.advantage import Advantage, group_center, leave_one_out, to_tokens, whiten, without_penalty
from rlhf.algos.algorithm import KL, NO_KL, Algorithm, Mismatch
from rlhf.algos.ratio import product_ratio, token_ratio
from rlhf.algos.reduction import sequence_mean_token_sum, token_mean
from rlhf.algos.weighted import awr_weights
from rlhf.types import AdvantageInputs

NO_MISMATCH = Mismatch("none")

Baseline = Literal["none", "group_mean", "leave_one_out", "prompt_value"]
Compare = Callable[[AdvantageInputs], Tensor]
"""How much better each sequence was than expected, `[S]`; NaN where it has no reward."""


def above_prompt_value(inputs: AdvantageInputs) -> Tensor:
    """R - V(prompt), V frozen (A-LoL, arXiv:2305.14718)."""
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


def what_is_better(compare: Compare) -> Advantage:
    """max(A, 0), A by `compare`, for all tokens of a sequence."""

    def advantage(inputs: AdvantageInputs) -> Tensor:
        return to_tokens(compare(inputs).nan_to_num(nan=0.0).clamp(min=0.0), inputs)

    return advantage


def best_of_group(compare: Compare) -> Advantage:
    """1 for the best of each group (the first of equals) if its A, by `compare`, is above 0; else 0."""

    def advantage(inputs: AdvantageInputs) -> Tensor:
        rewards = without_penalty(inputs).nan_to_num(nan=-torch.inf)
        index = torch.arange(len(rewards), device=rewards.device)
        top = torch.full_like(rewards, -torch.inf).scatter_reduce(0, inputs.group, rewards, "amax")
        candidate = torch.where(rewards == top[inputs.group], index, len(rewards))
        first = torch.full_like(index, len(rewards)).scatter_reduce(0, inputs.group, candidate, "amin")
        best = (first[inputs.group] == index) & (compare(inputs) > 0)
        return to_tokens(best.to(rewards.dtype), inputs)

    return advantage


def exponential(
    compare: Compare, *, temperature: float, max_weight: float, standardize: bool, normalize: bool
) -> Advantage:
    """min(exp(A / temperature), max_weight) for all tokens of a sequence (AWR, arXiv:1910.00177 eq. 10).

    `standardize`: A minus its mean, divided by its standard deviation, over the sequences of all ranks first.
    `normalize`: divided by the mean weight, which makes the learning rate independent of the temperature.
    """

    def advantage(inputs: AdvantageInputs) -> Tensor:
        compared, known = compare(inputs), ~inputs.rewards.isnan()
        if standardize:
            compared = whiten(compared, known, all_sum=inputs.all_sum, eps=1e-10)
        weights = awr_weights(compared, temperature=temperature, max_weight=max_weight)
        weights = weights.masked_fill(~known, 0.0)
        if normalize:
            weights = weights / _mean(weights, known, inputs.all_sum)
        return to_tokens(weights.to(inputs.rewards.dtype), inputs)

    return advantage


def _mean(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
    total, count = all_sum(torch.stack([x.sum().double(), mask.sum().double()])).unbind()
    return total / count.clamp(min=1)


# laid out by hand: one algorithm is one short paragraph
# fmt: off


def sft(
    *, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Supervised fine-tuning: every completion alike, whatever its reward."""
    return Algorithm(
        advantage=what_is_better(alike),
        ratio=token_ratio,
        surrogate=surrogate.reinforce,
        reduction=token_mean,
        imitates=True, pointwise=True,
        kl=kl, mismatch=mismatch, entropy_coef=entropy_coef,
    )


def best_of(
    *, baseline: Baseline = "none",
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Supervised fine-tuning on the best of each group if it is above `baseline` (A2PR's, 2405.19909)."""
    return replace(
        sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef), pointwise=False,
        advantage=best_of_group(COMPARE[baseline]), needs_prompt_value=baseline == "prompt_value",
    )


def weighted_bc(
    *, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Behaviour cloning, each completion weighted by its reward (a baseline of arXiv:2305.14718)."""
    base = sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=what_is_better(without_penalty), reduction=sequence_mean_token_sum)


def r_gold(
    *, floor: float = 0.1,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """GOLD with the reward of the completion (arXiv:2009.07839, as a baseline of 2305.14718)."""
    base = weighted_bc(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, surrogate=partial(surrogate.gold, floor=floor))


def r_lol(
    *, clip: float = 0.9, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """A-LoL with the reward in place of the advantage, arXiv:2305.14718."""
    base = a_lol(clip=clip, kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=what_is_better(without_penalty), needs_prompt_value=False)


def a_lol(
    *, clip: float = 0.9, kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Advantage-leftover-lunch RL: a completion is one action, arXiv:2305.14718."""
    base = a_lol_ref_free(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    weight = partial(surrogate.cispo, low=clip, high=clip)
    return replace(base, ratio=product_ratio, anchor="reference", surrogate=weight)


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
    return replace(base, advantage=what_is_better(above_prompt_value), needs_prompt_value=True)


def a_lol_kl(
    *, ratio_penalty: float = 0.0,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Reference-free A-LoL plus `ratio_penalty` log(policy / reference) of the data, arXiv:2305.14718."""
    base = a_lol_ref_free(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, ratio=token_ratio, anchor="reference", silent_at_zero=ratio_penalty == 0.0,
                   surrogate=partial(surrogate.reinforce_against, coef=ratio_penalty))


def awr(
    *, temperature: float = 1.0, max_weight: float = 20.0, baseline: Baseline = "leave_one_out",
    standardize: bool = True, normalize: bool = True,
    kl: KL = NO_KL, mismatch: Mismatch = NO_MISMATCH, entropy_coef: float = 0.0,
) -> Algorithm:
    """Advantage-weighted regression with a completion as one action, arXiv:1910.00177."""
    weights = exponential(COMPARE[baseline], temperature=temperature, max_weight=max_weight,
                          standardize=standardize, normalize=normalize)
    return replace(sft(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef), advantage=weights,
                   pointwise=baseline in POINTWISE, needs_prompt_value=baseline == "prompt_value")


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
}
