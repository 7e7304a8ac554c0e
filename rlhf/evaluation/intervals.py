"""95% confidence intervals of the share of correct completions, and the estimator of pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""97.5% quantile of the normal distribution."""
RESAMPLES = 10_000


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k samples drawn from n include one of the c correct.

    It is an unbiased estimate of the chance that at least one of k new samples is correct (arXiv:2107.03374
    eq. 1); 1 - (1 - c/n)^k is biased. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """95% score interval of a share of n trials (Wilson 1927), wider than 0 even for shares 0 and 1."""
    centre, shrink = mean + Z**2 / (2 * n), 1 + Z**2 / n
    margin = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - margin) / shrink), min(1.0, (centre + margin) / shrink)


def normal_interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of `shares`, the share of correct completions of each prompt.

    It is the normal interval over prompts. Where all prompts have the same share, its width would be 0; then
    Wilson's interval with each prompt as one trial is returned instead.
    """
    n, mean = len(shares), sum(shares) / len(shares)
    variance = sum((s - mean) ** 2 for s in shares) / max(1, n - 1)
    if variance > 0:
        margin = Z * math.sqrt(variance / n)
        return max(0.0, mean - margin), min(1.0, mean + margin)
    return wilson(mean, n)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile interval of the mean of `values`, one value in [0, 1] per prompt, by the bootstrap.

    Samples of one prompt are not independent, so whole prompts are drawn with replacement, 10,000 times, from
    a fixed seed. Where all prompts have the same value, Wilson's interval with each prompt as one trial is
    returned instead, because the bootstrap interval would have no width.
    """
    if len(set(values)) == 1:
        return wilson(values[0], len(values))
    generator = np.random.default_rng(0)
    array = np.asarray(values)
    # 500 resamples at a time, so that memory does not grow with prompts times resamples
    means = np.concatenate(
        [
            array[generator.integers(0, len(array), (min(500, RESAMPLES - i), len(array)))].mean(axis=1)
            for i in range(0, RESAMPLES, 500)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
