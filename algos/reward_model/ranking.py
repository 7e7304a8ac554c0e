"""Rankings as samples of a policy: the Plackett-Luce model, its policy gradient, and nDCG.

Neural PG-RANK (arXiv:2310.04407): scores s of n candidates are a policy over rankings r,

    log P(r) = sum over places i of  s_{r_i} - log sum over j >= i of exp s_{r_j}

With two candidates P is the Bradley-Terry probability.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sample_rankings(
    scores: Float[Tensor, " n"], count: int, generator: torch.Generator
) -> Int[Tensor, "{count} n"]:
    """`count` rankings drawn from the Plackett-Luce model: candidates sorted by score + Gumbel noise.

    A row has the numbers of the candidates, best place first. Draws from `generator`, on the CPU.
    """
    uniform = torch.rand(count, len(scores), generator=generator, dtype=torch.float64)
    # a uniform of exactly 0 would be infinitely far behind
    noise = -(-uniform.clamp(min=1e-300).log()).log()
    return (scores.detach().double().cpu() + noise).argsort(-1, descending=True).to(scores.device)


def ranking_logprob(
    scores: Float[Tensor, " n"], rankings: Int[Tensor, "N n"], top: int | None = None
) -> Float[Tensor, " N"]:
    """log P of each ranking, or, with `top`, of its first `top` places."""
    placed = scores[rankings]
    remaining = placed.flip(-1).logcumsumexp(-1).flip(-1)
    return (placed - remaining)[:, :top].sum(-1)


def ndcg(relevance: Float[Tensor, "N n"], top: int | None = None) -> Float[Tensor, " N"]:
    """Discounted gain of the first `top` places over that of the best order; `relevance` is in ranked order.

    The gain of a place i (from 1) is relevance / log2(i + 1); 0 where nothing is relevant.
    """
    places = torch.arange(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    discount = 1.0 / (places + 2.0).log2()
    best = relevance.sort(-1, descending=True).values
    gained, most = ((row * discount)[:, :top].sum(-1) for row in (relevance, best))
    return torch.where(most > 0, gained / most.where(most > 0, 1.0), 0.0)


def leave_one_out(utilities: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Each utility minus the mean of the others."""
    count = len(utilities)
    return (utilities - utilities.mean()) * (count / (count - 1))


def ranking_loss(
    scores: Float[Tensor, " n"],
    rankings: Int[Tensor, "N n"],
    utilities: Float[Tensor, " N"],
    top: int | None = None,
) -> Float[Tensor, ""]:
    """-(1/N) sum of (utility - mean of the others) * log P(ranking): its gradient raises the mean utility.

    With `top` only the first places count, in the utilities too. The others then add noise alone.
    """
    return -(leave_one_out(utilities) * ranking_logprob(scores, rankings, top)).mean()


def expected_first(scores: Float[Tensor, " n"], relevance: Float[Tensor, " n"]) -> float:
    """nDCG@1 of the order by score, the mean over the orders of candidates with the same highest score."""
    most = relevance.max().item()
    first = relevance[scores == scores.max()].mean().item()
    return first / most if most > 0 else math.nan
