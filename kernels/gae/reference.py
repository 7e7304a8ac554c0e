"""What the advantages are: a loop from the last token to the first, all sequences at once."""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(
    rewards: Tensor, values: Tensor, sequence: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Advantages `[N]`, 0 where the mask is; see `gae` for the formula."""
    result = torch.zeros_like(rewards)
    kept = mask.nonzero()[:, 0]
    if not len(kept):
        return result
    names = sequence[kept]
    row = torch.cat([names.new_zeros(1, dtype=torch.long), (names[1:] != names[:-1]).cumsum(0)])
    lengths = torch.bincount(row)
    # 0 for the last kept token of a sequence, so that every sequence starts its walk there
    to_end = lengths.cumsum(0)[row] - 1 - torch.arange(len(kept), device=kept.device)
    decay = lam[kept] if isinstance(lam, Tensor) else torch.full_like(rewards[kept], lam)

    table = rewards.new_zeros(4, int(lengths.max()), len(lengths))
    table[:, to_end, row] = torch.stack(
        [rewards[kept], values[kept], decay.to(rewards.dtype), table.new_ones(len(kept))]
    )
    next_value = next_advantage = rewards.new_zeros(len(lengths))
    walked: list[Tensor] = []
    for reward, value, step_lam, exists in table.unbind(1):
        next_advantage = exists * (reward + gamma * next_value - value + gamma * step_lam * next_advantage)
        next_value = value
        walked.append(next_advantage)
    result[kept] = torch.stack(walked)[to_end, row]
    return result
