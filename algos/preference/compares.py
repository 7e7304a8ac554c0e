"""Compares: the loss of a margin z, given the probability p that its + side is the better one.

Each is p l(z) + (1 - p) l(-z) with the l of a certain label below, so that a soft label is the mean over the
two hard ones; `nca` and an `absolute` with two weights have another l for "not good".

    logistic    -ls(z - margin)               absolute     1 - sigmoid(z)
    robust      (-(1-e) ls(z) + e ls(-z)) / (1 - 2e)       clipped      -ls(z within +-bound)
    squared     (z - target)^2                nca          -p ls(z) - ls(-z) / 2
    hinge       max(delta - z, 0)             discopop     (1-m) (-ls(z)) + m e^-z, m = sigmoid(z / tau)
    exo         KL(sigmoid(z) || 1 - e), of two outcomes

ls is log sigmoid. `squared` leaves out a constant: (z - (2p - 1) target)^2 has the gradient of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algos.preference.checks import check_smoothing

Compare = Callable[[Tensor, Tensor], Tensor]
"""`(margin[M], target[M]) -> loss[M]`."""


def either_way(certain: Callable[[Tensor], Tensor]) -> Compare:
    """p l(z) + (1 - p) l(-z), from the loss l of a margin whose label is certain."""

    def compare(margin: Tensor, target: Tensor) -> Tensor:
        return target * certain(margin) + (1.0 - target) * certain(-margin)

    return compare


def logistic(*, smoothing: float = 0.0, margin: float = 0.0) -> Compare:
    """-log sigmoid(z - margin), where a label is wrong with the probability `smoothing` (cDPO)."""
    check_smoothing(smoothing)

    def certain(z: Tensor) -> Tensor:
        loss = -logsigmoid(z - margin)
        if smoothing:
            loss = (1.0 - smoothing) * loss - smoothing * logsigmoid(-z - margin)
        return loss

    return either_way(certain)


def robust(smoothing: float) -> Compare:
    """The logistic loss whose mean over labels that are flipped with the probability `smoothing` is that of
    the true labels (arXiv:2403.00409).
    """
    check_smoothing(smoothing)
    scale = 1.0 / (1.0 - 2.0 * smoothing)
    return either_way(lambda z: scale * (smoothing * logsigmoid(-z) - (1.0 - smoothing) * logsigmoid(z)))


def squared(target: float) -> Compare:
    """(z - (2p - 1) target)^2: the margin is to become `target` (IPO, arXiv:2310.12036)."""
    return lambda margin, p: (margin - (2.0 * p - 1.0) * target).square()


def hinge(delta: float) -> Compare:
    """max(delta - z, 0) (SLiC, arXiv:2305.10425)."""
    return either_way(lambda z: (delta - z).clamp(min=0.0))


def absolute(*, good: float = 1.0, bad: float = 1.0) -> Compare:
    """p good (1 - sigmoid(z)) + (1 - p) bad sigmoid(z): the distance of sigmoid(z) from the label (KTO)."""

    def compare(margin: Tensor, target: Tensor) -> Tensor:
        return target * good * torch.sigmoid(-margin) + (1.0 - target) * bad * torch.sigmoid(margin)

    return compare


def clipped_logistic(bound: float, *, one_sided: bool = False) -> Compare:
    """-log sigmoid(z kept within +-bound): no gradient beyond it (chi^2-PO, arXiv:2407.13399).

    That is so also for a margin below -bound, a very wrong pair; `one_sided` keeps z below +bound alone.
    """
    return either_way(lambda z: -logsigmoid(z.clamp(None if one_sided else -bound, bound)))


def nca() -> Compare:
    """-p log sigmoid(z) - log sigmoid(-z) / 2 of a single completion (arXiv:2402.05369)."""
    return lambda margin, target: -target * logsigmoid(margin) - 0.5 * logsigmoid(-margin)


def discopop(tau: float) -> Compare:
    """(1 - m) (-log sigmoid(z)) + m e^-z, with m = sigmoid(z / tau) (arXiv:2406.08414)."""
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must be above 0 and at most 1 for discopop, got {tau}")

    def certain(z: Tensor) -> Tensor:
        # m e^-z in one exponential: e^-z alone overflows where m is tiny
        return -torch.sigmoid(-z / tau) * logsigmoid(z) + (logsigmoid(z / tau) - z).exp()

    return either_way(certain)


def exo(smoothing: float) -> Compare:
    """KL from (1 - smoothing, smoothing) of (sigmoid(z), sigmoid(-z)): reverse KL (arXiv:2402.00856)."""
    if not 0.0 < smoothing < 0.5:
        raise ValueError(f"label_smoothing must be above 0 and below 0.5 for exo, got {smoothing}")
    right, wrong = math.log1p(-smoothing), math.log(smoothing)

    def certain(z: Tensor) -> Tensor:
        won, lost = logsigmoid(z), logsigmoid(-z)
        return won.exp() * (won - right) + lost.exp() * (lost - wrong)

    return either_way(certain)
