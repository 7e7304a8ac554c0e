"""The reference backend of GAE: a loop from the last token to the first, over all sequences at once."""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(
    rewards: Tensor, values: Tensor, sequence: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Advantages `[N]`, 0 where the mask is 0; see `gae` for the formula."""
    result = torch.zeros_like(rewards)
    unmasked = mask.nonzero()[:, 0]
    if not len(unmasked):
        return result
    ids = sequence[unmasked]
    row = torch.cat([ids.new_zeros(1, dtype=torch.long), (ids[1:] != ids[:-1]).cumsum(0)])
    lengths = torch.bincount(row)
    # 0 for the last unmasked token of a sequence: the loop starts there in every sequence
    to_end = lengths.cumsum(0)[row] - 1 - torch.arange(len(unmasked), device=unmasked.device)
    decay = lam[unmasked] if isinstance(lam, Tensor) else torch.full_like(rewards[unmasked], lam)

    table = rewards.new_zeros(4, int(lengths.max()), len(lengths))
    table[:, to_end, row] = torch.stack(
        [rewards[unmasked], values[unmasked], decay.to(rewards.dtype), table.new_ones(len(unmasked))]
    )
    next_value = next_advantage = rewards.new_zeros(len(lengths))
    found: list[Tensor] = []
    for reward, value, step_lam, exists in table.unbind(1):
        next_advantage = exists * (reward + gamma * next_value - value + gamma * step_lam * next_advantage)
        next_value = value
        found.append(next_advantage)
    result[unmasked] = torch.stack(found)[to_end, row]
    return result
