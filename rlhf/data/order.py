"""The order in which a run visits its prompts: shuffled anew each epoch, a function of seed and position."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def order(seed: int, num_prompts: int, position: int, count: int) -> list[int]:
    """Prompt indices at places `position .. position + count - 1` of an endless sequence of shuffled epochs.

    Each epoch visits each of the `num_prompts` prompts once, in an order of its own.
    """
    assert num_prompts >= 1 and position >= 0 and count >= 0, (num_prompts, position, count)
    places = (divmod(at, num_prompts) for at in range(position, position + count))
    return [int(_shuffled(seed, num_prompts, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)
def _shuffled(seed: int, num_prompts: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # NumPy guarantees that the raw stream of a bit generator never changes, but not that of `permutation`
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_prompts)
    return np.argsort(draws, kind="stable")
