"""Losses of a reward model: Bradley-Terry on pairs of completions, squared error on ratings.

Differences from PPO-max (arXiv:2307.04964 section 3.2): 1. the mean is over the pairs of a whole update, over
all ranks and microbatches; 2. ratings with several objectives, which the paper does not have, are learned by
their squared error, an objective that was not rated by none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """-log sigmoid(chosen - rejected), where the sigmoid is P(chosen is better), for each of P pairs."""
    return F.softplus(rejected - chosen)


def rating_loss(scores: Float[Tensor, "S K"], ratings: Float[Tensor, "S K"]) -> Float[Tensor, "S K"]:
    """0.5 (score - rating)^2; 0 without gradient where the rating is NaN, which means that there is none."""
    known = ~ratings.isnan()
    return 0.5 * (scores - torch.where(known, ratings, scores)).square()
