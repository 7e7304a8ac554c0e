"""95% intervals of accuracies and of mean rewards over prompts, and the estimator of pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z = 1.959964
"""97.5% quantile of the normal distribution."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k samples drawn from n include one of the c correct.

    It is an unbiased estimate of the chance that at least one of k new samples is correct (arXiv:2107.03374
    eq. 1); 1 - (1 - c/n)^k is biased. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def share_interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of `shares`, one value in [0, 1] for each prompt.

    Samples of one prompt are not independent, so prompts are what is counted. It is the normal interval
    after four prompts are added, two of share 0 and two of share 1: with one sample of each prompt exactly
    the "plus four" interval of Agresti and Coull (The American Statistician 52, 1998, 119). It serves all
    cases: it has a width where all prompts agree, and one correct completion more hardly moves it.
    """
    adjusted = [*shares, 0.0, 0.0, 1.0, 1.0]
    mean = fmean(adjusted)
    margin = Z * math.sqrt(fmean((share - mean) ** 2 for share in adjusted) / len(adjusted))
    return max(0.0, mean - margin), min(1.0, mean + margin)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% normal interval of the mean of `values`, one of any range for each prompt; of one no width."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, mean
    margin = Z * stdev(values) / math.sqrt(len(values))
    return mean - margin, mean + margin
