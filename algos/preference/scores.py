"""Scores: what a loss adds up with signs, one number for each entry of a contrast.

    log_ratio   beta D                          chi        beta (D + e^D)
    log_prob    beta log policy                 positive   beta (D - lam max(-D, 0)) on the + side
    log_odds    a - log(1 - e^a), with a the mean log-prob of a token
    to_iterate  beta (log policy - log iterate)
    between     log policy - (tau / eta) log reference - (1 - tau / eta) log iterate

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
    iterate: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """D, in nats."""
        assert self.reference is not None, "the algorithm needs a reference"
        return self.policy - self.reference

    @property
    def log_ratio_to_iterate(self) -> Tensor:
        """log policy - log iterate, in nats."""
        assert self.iterate is not None, "the algorithm needs the policy of the last iteration"
        return self.policy - self.iterate


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


def to_iterate(beta: float) -> Score:
    """beta (log policy - log iterate): DPO's score with the policy of the last iteration as reference."""
    check_above_zero(beta=beta)

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        return beta * sums.log_ratio_to_iterate

    return score


def between(tau: float, eta: float) -> Score:
    """(tau / eta) D + (1 - tau / eta) (log policy - log iterate) (INPO, arXiv:2407.00617).

    Raises ValueError unless 0 < tau <= eta.
    """
    check_above_zero(tau=tau, eta=eta)
    if tau > eta:
        raise ValueError(f"tau must be at most eta, got tau = {tau} and eta = {eta}")
    share = tau / eta

    def score(sums: Sums, coefficient: Tensor) -> Tensor:
        return share * sums.log_ratio + (1.0 - share) * sums.log_ratio_to_iterate

    return score
