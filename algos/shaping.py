"""How an algorithm changes rewards before it compares them, and which groups it learns from (DAPO).

Differences from the paper: 1. groups are kept by their rewards as scored, before the length punishment, so
that a group whose completions are all correct does not count as mixed because one completion was long; the
paper writes "accuracy".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlhf.types import Group


def unshaped(reward: float, length: int) -> float:
    """The reward as it is."""
    return reward


def overlong(max_tokens: int, cache: int) -> Callable[[float, int], float]:
    """Shaping by the soft overlong punishment (DAPO, arXiv:2503.14476 eq. 13), with lengths in tokens.

    0 up to `max_tokens - cache`, from there falling in a straight line to -1 at `max_tokens`, -1 beyond.
    A cache of 0 punishes nothing. Raises ValueError unless 0 <= cache <= max_tokens.
    """
    if not 0 <= cache <= max_tokens:
        raise ValueError(f"overlong_cache must lie in 0..max_tokens = {max_tokens}, got {cache}")
    if cache == 0:
        return unshaped

    def shape(reward: float, length: int) -> float:
        return reward + max(min((max_tokens - cache - length) / cache, 0.0), -1.0)

    return shape


def keep_all(group: Group) -> bool:
    """True: every group is learned from."""
    return True


def keep_mixed(group: Group) -> bool:
    """True for groups whose rewards differ: the others have no advantage (dynamic sampling)."""
    return len(set(group.rewards)) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which of the sampled groups and completions are learned from (DAPO, arXiv:2503.14476)."""

    keep: Callable[[Group], bool] = keep_all
    """Whether the algorithm accepts a group, by its rewards before `shape_reward`."""
    refill: int = 0
    """How many more rounds of sampling may replace the groups that were not accepted."""
    drop_truncated: bool = False
    """Completions cut at the length limit are compared, but not learned from (overlong filtering)."""
    own_only: bool = False
    """Completions of other models are compared with the policy's own, but not learned from."""


EVERYTHING = Selection()
