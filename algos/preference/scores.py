"""Scores: what a loss adds up with signs, one number for each entry of a contrast.

    log_ratio   beta D                          chi        beta (D + e^D)
    log_prob    beta log policy                 positive   beta (D - lam max(-D, 0)) on the + side
    log_odds    a - log(1 - e^a), with a the mean log-prob of a token

D = log policy - log reference of the whole completion, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algos.preference.checks import check_above_zero


@dataclass(frozen=True, slots=True)
class Sums:
    """Log-probs of whole completions, one for each entry of a contrast: fp32 or better, `[E]`."""

    policy: Tensor
    """With gradient."""
    reference: Tensor | None
    tokens: Tensor
    """Tokens of the completion, at least 1."""

    @property
    def log_ratio(self) -> Tensor:
        """D, in nats."""
        assert self.reference is not None, "the algorithm needs a reference"
        return self.policy - self.reference


Score = Callable[[Sums, Tensor], Tensor]
"""`(sums, coefficient[E]) -> [E]`, differentiable in `sums.policy`."""


def log_ratio(beta: float, *, per_token: bool = False) -> Score:
    """beta D, or beta D / tokens."""
    check_above_zero(beta=beta)

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        return beta * (sums.log_ratio / sums.tokens if per_token else sums.log_ratio)

    return score


def log_prob(beta: float, *, per_token: bool = False) -> Score:
    """beta log policy, or that divided by the tokens: no reference."""
    check_above_zero(beta=beta)

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        return beta * (sums.policy / sums.tokens if per_token else sums.policy)

    return score


def log_odds() -> Score:
    """log(q / (1 - q)), where log q is the mean log-prob of a token (ORPO, arXiv:2403.07691 eq. 4).

    A completion that is certain (q = 1) has finite odds here: log q is kept below 0 by the dtype's epsilon.
    """

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        mean = (sums.policy / sums.tokens).clamp(max=-torch.finfo(sums.policy.dtype).eps)
        return mean - (-torch.expm1(mean)).log()

    return score


def chi(beta: float, *, limit: float = 20.0) -> Score:
    """beta (D + e^min(D, limit)): fp32 would overflow without the limit (chi^2-PO, arXiv:2407.13399)."""
    check_above_zero(beta=beta)

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        return beta * (sums.log_ratio + sums.log_ratio.clamp(max=limit).exp())

    return score


def positive(beta: float, lam: float) -> Score:
    """beta D, less beta lam max(-D, 0) on the + side: it must not fall below the reference (DPOP)."""
    check_above_zero(beta=beta)

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        fallen = (-sums.log_ratio).clamp(min=0.0)
        return beta * (sums.log_ratio - lam * fallen.masked_fill(coefficient < 0, 0.0))

    return score
