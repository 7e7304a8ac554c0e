"""An algorithm of your own: a function whose keyword arguments are its settings.

An algorithm is made of parts (docs/algorithms.md). This one replaces two parts of GRPO: the advantage is the
share of its group that a completion beats minus the share that beats it, and the surrogate pulls the ratio
back to 1 smoothly.
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
    """GRPO that uses only the order of the rewards: an outlier counts no more than any other winner."""
    if rank_width <= 0:
        raise ValueError(f"rank_width must be above 0, got {rank_width}")
    return replace(grpo(kl=kl), advantage=per_sequence(beaten), surrogate=partial(parabola, width=rank_width))


def beaten(rewards: Tensor, group: Tensor) -> Tensor:
    """Completions of the group with a lower reward minus those with a higher one, over the group size."""
    same = group[:, None] == group[None, :]
    sign = torch.sign(rewards[:, None] - rewards[None, :])
    return (sign * same).sum(dim=1) / same.sum(dim=1)


def parabola(logprobs: Tensor, ratio: Tensor, advantages: Tensor, *, width: float) -> TokenLoss:
    """-A r + (r - 1)^2 / (2 width): at r = 1 the gradient is that of -A r; it fades as r moves away."""
    distance = (ratio - 1).abs()
    return TokenLoss(-advantages * ratio + distance**2 / (2 * width), {"own/distance": distance})
