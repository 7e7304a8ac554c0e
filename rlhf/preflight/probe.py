"""What an algorithm does with rewards, found by asking its advantage for a few completions of one token."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch

from rlhf.algos.algorithm import Algorithm
from rlhf.tensors.steps import StepRewards
from rlhf.types import AdvantageInputs


def learns_from_one(algorithm: Algorithm) -> bool:
    """Whether two prompts with one completion each, of which one is correct, have any nonzero advantage."""
    if algorithm.critic is not None or not algorithm.needs_rewards:
        return True
    return any(_advantages(algorithm, [0.0, 1.0], [0, 1]))


def ignores_rewards(algorithm: Algorithm) -> bool:
    """Whether all completions are learned from alike, whatever their rewards, as by `sft`."""
    if algorithm.critic is not None or algorithm.preference is not None:
        return False
    if not algorithm.needs_rewards:
        return True
    several = [_advantages(algorithm, rewards, [0, 0]) for rewards in ([0.0, 1.0], [1.0, 0.0], [1.0, 1.0])]
    return several[0] == several[1] == several[2] and any(several[0])


def credits_steps(algorithm: Algorithm) -> bool:
    """Whether it matters to the advantages which token earned a reward."""
    early, late = ([1.0, nan, 0.0, nan], [nan, 1.0, nan, 0.0])
    found = [_inputs([1.0, 0.0], [0, 0], tokens=2, earned=at) for at in (early, late)]
    first, second = (algorithm.advantage(inputs) for inputs in found)
    return not torch.equal(first, second)


def _advantages(algorithm: Algorithm, given: Sequence[float], group: Sequence[int]) -> list[float]:
    return [float(advantage) for advantage in algorithm.advantage(_inputs(given, group))]


def _inputs(
    given: Sequence[float], group: Sequence[int], *, tokens: int = 1, earned: Sequence[float] | None = None
) -> AdvantageInputs:
    """Completions of so many tokens with these rewards, all of them `earned` by steps that end at tokens."""
    rewards = torch.tensor(given)
    sequence = torch.arange(len(given)).repeat_interleave(tokens)
    none, some = torch.zeros(len(given)), torch.zeros(len(sequence))
    return AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=torch.ones(1),
        group=torch.tensor(group),
        token_penalty=some,
        sequence=sequence,
        loss_mask=some == 0,
        turn=torch.zeros_like(sequence),
        values=some,
        prompt_values=none,
        temperature_factors=torch.ones(len(given)),
        steps=None if earned is None else StepRewards(torch.tensor(earned), none),
    )
