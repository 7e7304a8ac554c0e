"""Shares of right completions with 95% intervals, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
RESAMPLES = 10_000


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that of k samples drawn from n, c of them right, one is right.

    Unbiased for the chance that one of k fresh samples is (arXiv:2107.03374 eq. 1); 1 - (1 - c/n)^k is not.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """95% score interval of a share of n trials (Wilson 1927); it has a width where the share is 0 or 1."""
    centre, shrink = mean + Z**2 / (2 * n), 1 + Z**2 / n
    margin = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - margin) / shrink), min(1.0, (centre + margin) / shrink)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile interval of the mean of one value in [0, 1] a prompt, prompts drawn with replacement.

    Samples of one prompt are not independent, so prompts are what is drawn anew, 10,000 times from a fixed
    seed. Where all prompts agree that has no width: Wilson's interval with a prompt as one trial stands in.
    """
    if len(set(values)) == 1:
        return wilson(values[0], len(values))
    generator = np.random.default_rng(0)
    array = np.asarray(values)
    # a few resamples at once, so that memory does not grow with both counts
    means = np.concatenate(
        [
            array[generator.integers(0, len(array), (min(500, RESAMPLES - i), len(array)))].mean(axis=1)
            for i in range(0, RESAMPLES, 500)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
