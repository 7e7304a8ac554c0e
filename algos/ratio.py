"""Importance ratios: policy to old policy (with gradient), and old policy to the engine (a weight, without).

rho_t = exp(log_ratio_t) is the second one, the ratio of a token's probabilities under old policy and engine.

Differences from the papers and codes: 1. the sequence ratio (GSPO) is always in its token form, the same
value and gradient when the advantage is constant over a sequence; 2. `sequence_mask` and `geometric` give
weights 0 or 1 (TRL keeps the ratio as the weight of the sequences it does not mask); 3. bounds always apply
to old policy / engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algos.segments import sequence_sum, sequence_tokens

Ratio = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(logprobs[N], old_logprobs[N], loss_mask[N], sequence[N]) -> ratio[N]`, differentiable in `logprobs`."""

Correction = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
"""`(log_ratio[N], loss_mask[N], sequence[N], low, high) -> weight[N]`, with log_ratio = log old policy - log
engine."""


def token_ratio(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    sequence: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """r_t = exp(d_t), d_t = logprobs - old_logprobs kept in [-20, 20]."""
    return (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()


def sequence_ratio(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    sequence: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """s_i = exp(mean over the sequence of d_t), its gradient that of s_i * logprob_t (arXiv:2507.18071).

    The mean log-ratio is kept below 10.
    """
    log_ratio = (logprobs - old_logprobs).detach().masked_fill(~loss_mask, 0.0)
    mean = sequence_sum(log_ratio, sequence) / sequence_tokens(loss_mask, sequence, log_ratio)
    return mean.clamp(max=10.0).exp() * (logprobs - logprobs.detach()).exp()


def product_ratio(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    sequence: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """exp(sum over the sequence of d_t), for each of its tokens: a completion is one action (A-LoL).

    The sum is kept in [-20, 20].
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~loss_mask, 0.0)
    return sequence_sum(log_ratio, sequence).clamp(-20.0, 20.0).exp()


def token_tis(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """min(rho_t, high): truncated importance sampling, token by token."""
    return log_ratio.clamp(-20.0, 20.0).exp().clamp(low, high)


def sequence_tis(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """min(product of rho_t over the sequence, high), for each of its tokens."""
    return _sequence_log(log_ratio, mask, sequence).exp().clamp(low, high)


def icepop(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """rho_t where low <= rho_t <= high, else 0: tokens on which engine and learner disagree are left out."""
    rho = log_ratio.clamp(-20.0, 20.0).exp()
    return rho.masked_fill((rho < low) | (rho > high), 0.0)


def sequence_mask(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """1 if the product of rho_t over the sequence is in [low, high], else 0."""
    return _within(_sequence_log(log_ratio, mask, sequence).exp(), low, high)


def geometric(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """1 if the geometric mean of rho_t over the sequence is in [low, high], else 0, at any length."""
    mean = _sequence_mean(log_ratio, mask, sequence)
    return _within(mean.clamp(-20.0, 20.0).exp(), low, high)


def mean_k2(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """1 if the mean over the sequence of (log rho_t)^2 / 2 is in [low, high], else 0."""
    return _within(_sequence_mean(log_ratio.square() / 2, mask, sequence), low, high)


def mean_k3(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """1 if the mean over the sequence of rho_t - 1 - log rho_t is in [low, high], else 0."""
    return _within(_sequence_mean(mismatch_k3(log_ratio), mask, sequence), low, high)


def no_correction(log_ratio: Tensor, mask: Tensor, sequence: Tensor, low: float, high: float) -> Tensor:
    """1 for every token."""
    return torch.ones_like(log_ratio)


def mismatch_k3(log_ratio: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """KL(engine || old policy) from the engine's samples: rho - 1 - log rho, never negative."""
    log_rho = log_ratio.clamp(-20.0, 20.0)
    return log_rho.expm1() - log_rho


CORRECTIONS: dict[str, tuple[Correction, float, float]] = {
    "none": (no_correction, 0.0, float("inf")),
    "token_tis": (token_tis, 0.0, 2.0),
    "sequence_tis": (sequence_tis, 0.0, 2.0),
    "icepop": (icepop, 0.5, 5.0),
    "sequence_mask": (sequence_mask, 0.5, 2.0),
    "geometric": (geometric, 0.999, 1.001),
    "k2": (mean_k2, 0.0, 2.0),
    "k3": (mean_k3, 0.0, 0.01),
}
"""Each correction with its usual bounds, low and high."""


def _sequence_log(log_ratio: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    return sequence_sum(log_ratio.masked_fill(~mask, 0.0), sequence).clamp(-20.0, 20.0)


def _sequence_mean(x: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    return sequence_sum(x.masked_fill(~mask, 0.0), sequence) / sequence_tokens(mask, sequence, x)


def _within(x: Tensor, low: float, high: float) -> Tensor:
    return ((x >= low) & (x <= high)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The correction for an engine whose probabilities differ from the learner's."""

    kind: Literal["none", "token_tis", "sequence_tis", "icepop", "sequence_mask", "geometric", "k2", "k3"] = (
        "token_tis"
    )
    """How the weight of a token's loss comes from old policy / engine (`CORRECTIONS`); `none`: it is 1."""
    low: float | None = None
    """Lower bound of the ratio, or of what the kind computes from it; None: the usual one of the kind."""
    high: float | None = None
    """Upper bound, as `low`."""

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 <= low <= high:
            raise ValueError(f"mismatch.{self.kind} needs 0 <= low <= high, got low {low}, high {high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound, each the usual one of the kind where none was given."""
        _, low, high = CORRECTIONS[self.kind]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def weight(self, log_ratio: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
        """The weight of each token's loss `[N]`, from log_ratio = log old policy - log engine `[N]`."""
        return CORRECTIONS[self.kind][0](log_ratio, mask, sequence, *self.bounds).detach()


TOKEN_TIS = Mismatch()
