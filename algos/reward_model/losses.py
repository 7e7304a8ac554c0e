"""Losses of a reward model, of scores that a model gives: Bradley-Terry on pairs, squared error on ratings.

Differences from PPO-max (arXiv:2307.04964 section 3.2): 1. the mean is over the pairs of a whole update, over
all ranks and microbatches; 2. ratings with several objectives, which the paper does not have, are learned by
their squared error, an objective that was not rated by none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], margin: Float[Tensor, " P"] | None = None
) -> Float[Tensor, " P"]:
    """-log sigmoid(chosen - rejected - margin) for each of P pairs.

    Without a margin (None) the sigmoid is P(chosen is better). A margin, in the units of the scores, is by
    how much the chosen completion is to be ahead at least (Llama 2, arXiv:2307.09288 eq. 2).
    """
    ahead = chosen - rejected
    return F.softplus(-(ahead if margin is None else ahead - margin))


def centring(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """(chosen + rejected)^2 for each pair, which keeps scores around 0 (arXiv:2312.09244).

    `bradley_terry` does not change when a constant is added to both scores, so it leaves their level open.
    """
    return (chosen + rejected).square()


def rating_loss(scores: Float[Tensor, "S K"], ratings: Float[Tensor, "S K"]) -> Float[Tensor, "S K"]:
    """0.5 (score - rating)^2; 0 without gradient where the rating is NaN, which means that there is none."""
    known = ~ratings.isnan()
    return 0.5 * (scores - torch.where(known, ratings, scores)).square()


def step_loss(scores: Float[Tensor, " S"], labels: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """-log of the probability of each step's label: sigmoid(score) of 1 (a good step), the rest of 0.

    Labels between 0 and 1 are shares, of completions from this step on that ended well, say.
    """
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def quality_gap(
    better: Float[Tensor, " P"],
    of_chosen: Float[Tensor, " P"],
    of_rejected: Float[Tensor, " P"],
    worse: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """The sum of five Bradley-Terry terms of PIT (arXiv:2310.00898 eq. 2), for each pair (chosen, rejected).

    g(a, b) says by how much a is better than b. `better` is g(chosen, rejected), `worse` g(rejected, chosen),
    `of_chosen` and `of_rejected` are g of a completion and itself. The order learned is
    better >= of_chosen, of_rejected >= worse, each step of it once, and better >= worse.
    """
    orders = (
        (better, of_chosen),
        (better, of_rejected),
        (better, worse),
        (of_chosen, worse),
        (of_rejected, worse),
    )
    return torch.stack([bradley_terry(above, below) for above, below in orders]).sum(0)
