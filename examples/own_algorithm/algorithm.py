"""An algorithm of one's own: a function, whose keyword arguments are its settings.

An algorithm is made of parts (docs/algorithms.md). This one replaces two of GRPO's: the advantage is how
many completions of its group a completion beats, and the surrogate pulls the ratio back to 1 smoothly.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rlhf.algos.advantage import per_sequence
from rlhf.algos.algorithm import KL, Algorithm
from rlhf.algos.surrogate import TokenLoss
from rlhf.algos.table import grpo

NO_KL = KL()


def by_rank(*, rank_width: float = 0.2, kl: KL = NO_KL) -> Algorithm:
    """GRPO that looks at the order of rewards alone, so an outlier has no more say than any other winner."""
    if rank_width <= 0:
        raise ValueError(f"rank_width must be above 0, got {rank_width}")
    return replace(grpo(kl=kl), advantage=per_sequence(beaten), surrogate=partial(parabola, width=rank_width))


def beaten(rewards: Tensor, group: Tensor) -> Tensor:
    """Completions of its group with a lower reward minus those with a higher one, over the group's size."""
    same = group[:, None] == group[None, :]
    sign = torch.sign(rewards[:, None] - rewards[None, :])
    return (sign * same).sum(dim=1) / same.sum(dim=1)


def parabola(logprobs: Tensor, ratio: Tensor, advantages: Tensor, *, width: float) -> TokenLoss:
    """-A r + (r - 1)^2 / (2 width): the gradient is that of -A r at r = 1 and fades as r moves off."""
    distance = (ratio - 1).abs()
    return TokenLoss(-advantages * ratio + distance**2 / (2 * width), {"own/distance": distance})
