"""A-LoL and advantage-weighted regression as single functions: completions imitated by their advantages.

Differences from the papers' code: 1. A-LoL returns a loss for each sequence, and the mean over the batch is
left to the caller; 2. the reward and value come in as their difference, so that R-LoL is A-LoL given rewards;
3. AWR's advantages are not standardised here (whiten them before, as that code does, where that is wanted).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def a_lol(
    logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " S"],
    sequence: Int[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    *,
    ratio: Literal["sequence", "token", "none"] = "sequence",
    clip: float = 0.9,
    kl_coef: float = 0.0,
) -> Float[Tensor, " S"]:
    """max(A, 0) * sum of -w logprob over the completion, w the clipped ratio (A-LoL, arXiv:2305.14718).

    w is the ratio to the reference, a constant in [1 - clip, 1 + clip]: of the whole sequence, of each token,
    or 1 ("none", reference-free). With `kl_coef` adds kl_coef * (log policy - log reference) of each
    completion.
    """
    zeros = logprobs.new_zeros(len(advantages))
    quiet = logprobs.masked_fill(~loss_mask, 0.0)
    log_ratio = quiet - ref_logprobs.masked_fill(~loss_mask, 0.0)
    by_sequence = zeros.index_add(0, sequence, log_ratio)
    exponent = {
        "sequence": by_sequence[sequence],
        "token": log_ratio,
        "none": torch.zeros_like(log_ratio),
    }[ratio]
    weight = exponent.detach().clamp(-20.0, 20.0).exp().clamp(1.0 - clip, 1.0 + clip)
    nll = zeros.index_add(0, sequence, -weight * quiet)
    return advantages.clamp(min=0.0) * nll + kl_coef * by_sequence


def awr(
    logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
    max_weight: float = 20.0,
) -> Float[Tensor, " N"]:
    """-min(exp(A / temperature), max_weight) logprob, for each token (AWR, arXiv:1910.00177 eq. 10)."""
    return -awr_weights(advantages, temperature=temperature, max_weight=max_weight) * logprobs


def awr_weights(
    advantages: Float[Tensor, " N"], *, temperature: float = 1.0, max_weight: float = 20.0
) -> Float[Tensor, " N"]:
    """min(exp(A / temperature), max_weight), a constant. AWAC caps at 100, IQL too with temperature 1/3."""
    return (advantages.detach() / temperature).exp().clamp(max=max_weight)
