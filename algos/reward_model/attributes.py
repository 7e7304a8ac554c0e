"""Scores of single attributes from frozen hidden states: ridge regression, and a correction for verbosity.

Stage 1 of ArmoRM (arXiv:2406.12845 section 2.1 and 2.2): r_i = w_i . h for each attribute i, where h is the
state at the end of a completion; then r'_i = r_i - lam_i r_verbosity, with the smallest lam_i at which r'_i
no longer rises with the verbosity.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# its annotations of these functions are incomplete
_torch: Any = torch

STRENGTHS = tuple(10.0**power for power in range(-4, 5))
"""Strengths of the L2 penalty that are tried, as in ArmoRM's code."""
HELD_OUT = 0.2
"""Share of the rated examples by whose squared error the strength is chosen."""
PENALTIES = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(i / 20 for i in range(3, 20)))
"""Values of lam that are tried, as in ArmoRM's code: up to 0.95."""
CORRELATION = 0.03
"""A corrected score may have at most this rank correlation with the verbosity."""


def ridge(
    states: Float[Tensor, "S H"], ratings: Float[Tensor, " S"], strengths: tuple[float, ...]
) -> Float[Tensor, "A H"]:
    """For each strength a: the w that minimises |states w - ratings|^2 + a |w|^2, without an intercept."""
    gram, target = states.mT @ states, states.mT @ ratings
    values: Tensor
    vectors: Tensor
    values, vectors = _torch.linalg.eigh(gram)
    along = vectors.mT @ target
    # rounding makes eigenvalues of 0 slightly negative
    shrunk = torch.stack([along / (values.clamp(min=0.0) + a) for a in strengths])
    return shrunk @ vectors.mT


def fit_attributes(
    states: Float[Tensor, "S H"], ratings: Float[Tensor, "S K"], generator: torch.Generator
) -> tuple[Float[Tensor, "K H"], list[float]]:
    """The weights of K attributes and the strengths that were chosen, each from the rows that rate it.

    A rating is NaN where there is none. The strength is the one with the least squared error on a fifth of
    the rows, drawn by `generator`; the weights are then fitted to all rows. Computes in float64.

    Raises ValueError: fewer than five rows rate an attribute.
    """
    weights: list[Tensor] = []
    chosen: list[float] = []
    for k in range(ratings.shape[1]):
        known = (~ratings[:, k].isnan()).nonzero()[:, 0]
        if len(known) < 5:
            raise ValueError(f"attribute {k} has {len(known)} ratings; at least 5 are needed to fit it")
        x, y = states[known].double(), ratings[known, k].double()
        shuffled = torch.randperm(len(known), generator=generator).to(known.device)
        held_out, train = shuffled.tensor_split([max(1, int(HELD_OUT * len(known)))])
        tried = ridge(x[train], y[train], STRENGTHS)
        errors = (tried @ x[held_out].mT - y[held_out]).square().mean(-1)
        strength = STRENGTHS[int(errors.argmin())]
        weights.append(ridge(x, y, (strength,))[0])
        chosen.append(strength)
    return torch.stack(weights), chosen


def spearman(a: Float[Tensor, " S"], b: Float[Tensor, " S"]) -> float:
    """Rank correlation; ties have their mean rank. 0 where one of the two is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    norm = ranks.square().sum(-1).prod().sqrt().item()
    return (ranks[0] * ranks[1]).sum().item() / norm if norm > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    inverse: Tensor
    counts: Tensor
    _, inverse, counts = _torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last.double() - (counts.double() - 1) / 2)[inverse]


def verbosity_penalties(scores: Float[Tensor, "S K"], verbosity: int) -> list[float]:
    """lam of each attribute: the smallest at which its rank correlation with the verbosity is at most 0.03.

    `scores`: of a reference set; `verbosity`: which of the K attributes it is. As in ArmoRM's code an
    attribute that falls with the verbosity has lam = 0, one that stays correlated at every value tried has
    lam = 1, and so has the verbosity itself, whose corrected score is thereby 0.
    """
    verbose = scores[:, verbosity]

    def penalty(k: int) -> float:
        if k == verbosity:
            return 1.0
        fits = (lam for lam in PENALTIES if spearman(scores[:, k] - lam * verbose, verbose) <= CORRELATION)
        return next(fits, 1.0)

    return [penalty(k) for k in range(scores.shape[1])]


def without_verbosity(
    weights: Float[Tensor, "K H"], penalties: list[float], verbosity: int
) -> Float[Tensor, "K H"]:
    """Weights whose scores are r'_i = r_i - lam_i r_verbosity."""
    lam = torch.tensor(penalties, dtype=weights.dtype, device=weights.device)
    return weights - lam[:, None] * weights[verbosity]
