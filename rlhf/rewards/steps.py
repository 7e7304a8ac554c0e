"""Rewards of steps: which token ends each step that a reward function has scored, and what it earned."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf.rewards.workers.pool import RewardError
from rlhf.rewards.workers.return_values import Steps
from rlhf.rollout.episode import Episode, Sample

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, as reward functions read completions."""


class Scored(NamedTuple):
    """The steps of a completion as one objective scores them."""

    owner: str
    """The reward function."""
    weight: float
    """Of the objective."""
    steps: Steps


def step_rewards(
    scored: Sequence[Scored], sample: Sample, text: str, decode: Decode
) -> tuple[tuple[int, float], ...]:
    """The tokens of `sample` that end steps, in order, and what each earned: weight times score, added up.

    A step ends with the token that completes its characters; where it ends with the text, with the last
    token, which may be the end-of-sequence token. Raises RewardError: a step ends outside of the text, or
    the sample is an episode.
    """
    earned: dict[int, float] = {}
    for owner, weight, steps in scored:
        if isinstance(sample, Episode):
            raise RewardError(
                f"reward function {owner} gives rewards to steps of a completion, and this is an episode of "
                "several turns: return one number for it"
            )
        for end, score in steps:
            if not 0 <= end <= len(text):
                raise RewardError(
                    f"reward function {owner}: a step ends behind character {end}, but the completion has "
                    f"{len(text)}: {text!r:.80}"
                )
            token = _token(sample.token_ids, text, end, decode)
            earned[token] = earned.get(token, 0.0) + weight * score
    return tuple(sorted(earned.items()))


def _token(token_ids: Sequence[int], text: str, end: int, decode: Decode) -> int:
    """The first token with which the decoded text begins with the first `end` characters of `text`."""
    last = len(token_ids) - 1
    if end == len(text):
        return last
    begun = text[:end]
    return min(
        last, bisect_left(range(last), True, key=lambda i: decode(token_ids[: i + 1]).startswith(begun))
    )
