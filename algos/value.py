"""The value loss of a critic, its explained variance, VAPO's lambda, and running moments of rewards.

Differences from the papers: 1. the value loss is given for each token, to go through the same reductions as
the policy's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, " N"]:
    """0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), for each token (PPO).

    Where the second square is the larger one, it is constant in V, so that there is no gradient.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (clipped - returns).square()) / 2


def explained_variance(
    values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    *,
    all_sum: Callable[[Tensor], Tensor] = lambda t: t,
) -> float:
    """1 - Var(R - V) / Var(R) over the unmasked tokens of all ranks: 1 perfect, 0 no better than a constant.

    NaN where the returns do not vary.
    """
    r = returns[mask].double()
    e = r - values[mask].double()
    moments = torch.stack([torch.ones_like(r).sum(), r.sum(), r.square().sum(), e.sum(), e.square().sum()])
    n, r1, r2, e1, e2 = (float(x) for x in all_sum(moments).unbind())
    if n == 0 or r2 / n - (r1 / n) ** 2 <= 1e-12 * r2 / n:
        return float("nan")
    return 1.0 - (e2 / n - (e1 / n) ** 2) / (r2 / n - (r1 / n) ** 2)


def adaptive_lambda(lengths: Int[Tensor, " S"], *, alpha: float = 0.05) -> Float[Tensor, " S"]:
    """lambda = 1 - 1 / (alpha * length), 0 up to a length of 1 / alpha (VAPO, arXiv:2504.05118).

    For `gae(..., lam=adaptive_lambda(lengths)[sequence])`.
    """
    return (1.0 - 1.0 / (alpha * lengths)).clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Mean and variance of all rewards so far, merged batch by batch (PPO-max, arXiv:2307.04964).

    The rewards of a step are merged first and then scaled by the merged moments.
    """

    count: float = 0.0
    mean: float = 0.0
    variance: float = 1.0
    """Population variance (divided by n)."""

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 as long as there are fewer than two rewards."""
        return (self.variance * self.count / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0

    @property
    def scale(self) -> float:
        """`std`, or 1 where the rewards are equal and `std` is only their rounding."""
        return self.std if self.std > 1e-7 * max(1.0, abs(self.mean)) else 1.0

    def update(self, x: Tensor, *, all_sum: Callable[[Tensor], Tensor] = lambda t: t) -> RunningMoments:
        """The moments after merging `x` of all ranks."""
        x = x.double()
        n, total = (float(v) for v in all_sum(torch.stack([torch.ones_like(x).sum(), x.sum()])).unbind())
        if n == 0:
            return self
        mean = total / n
        spread = float(all_sum((x - mean).square().sum()))
        count = self.count + n
        shift = mean - self.mean
        known = self.variance * self.count
        return RunningMoments(
            count=count,
            mean=self.mean + shift * n / count,
            variance=(known + spread + shift**2 * self.count * n / count) / count,
        )

    def normalize(self, x: Tensor, *, clip: float | None = None) -> Tensor:
        """(x - mean) / std, kept in [-clip, clip]."""
        scaled = (x - self.mean) / self.scale
        return scaled if clip is None else scaled.clamp(-clip, clip)
