"""What an algorithm does with rewards, found by asking its advantage for a few completions of one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.algos.algorithm import Algorithm
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


def _advantages(algorithm: Algorithm, given: Sequence[float], group: Sequence[int]) -> list[float]:
    each, rewards, none = torch.arange(len(given)), torch.tensor(given), torch.zeros(len(given))
    inputs = AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=torch.ones(1),
        group=torch.tensor(group),
        token_penalty=none,
        sequence=each,
        loss_mask=torch.ones(len(given), dtype=torch.bool),
        turn=torch.zeros_like(each),
        prompt_values=none,
        temperature_factors=torch.ones(len(given)),
    )
    return [float(advantage) for advantage in algorithm.advantage(inputs)]
