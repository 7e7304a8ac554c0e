"""Policy losses of single tokens `[N]`, to be minimised: clip, CISPO, SAPO, drift, REINFORCE, GOLD, AWR.

At ratio 1 each has the gradient -advantage * grad(logprob); they differ where the ratio is far from 1. The
ratio is given, of tokens or of sequences. A metric is a tensor `[N]`, which is averaged over the unmasked
tokens later.

Differences from the papers: 1. the dual clip is an option of `clip`, off unless asked for; 2. CISPO's bounds
are written like PPO's, 1 - low and 1 + high (TRL: an absolute cap), and without `low` there is no lower
bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algos.weighted import awr_weights


class TokenLoss(NamedTuple):
    """A loss for each token `[N]`, and metrics by name, each of every token `[N]`."""

    loss: Tensor
    metrics: dict[str, Tensor]


Surrogate = Callable[[Tensor, Tensor, Tensor], TokenLoss]
"""`(logprobs[N], ratio[N], advantages[N]) -> TokenLoss`."""


def clipped(*, low: float, high: float, dual: float | None = None) -> Surrogate:
    """The surrogate `clip` with these bounds. Raises ValueError when they do not enclose a ratio of 1."""
    if low < 0 or high < 0 or (dual is not None and dual <= 1):
        raise ValueError(
            "the ratio is kept in [1 - clip_low, 1 + clip_high]: both must be 0 or more, clip_dual above 1; "
            f"got {low}, {high}, {dual}"
        )
    return partial(clip, low=low, high=high, dual=dual)


def clip(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    low: float,
    high: float,
    dual: float | None = None,
) -> TokenLoss:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) (PPO, arXiv:1707.06347 eq. 7).

    With `dual` also min(..., -A dual) where A < 0 (dual clip, arXiv:1912.09729 eq. 5): a token that became
    far more likely than it was is not pushed down without bound.
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    loss = torch.maximum(plain, clipped)
    cut = clipped > plain
    metrics = {
        "clip_fraction": cut,
        "clip_fraction/low": cut & (advantages < 0),
        "clip_fraction/high": cut & (advantages > 0),
    }
    if dual is not None:
        cap = -advantages * dual
        over = (advantages < 0) & (loss > cap)
        loss = torch.where(advantages < 0, torch.minimum(loss, cap), loss)
        metrics["clip_fraction/dual"] = over
    return TokenLoss(loss, metrics)


def cispo(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    high: float,
    low: float | None = None,
) -> TokenLoss:
    """-sg(clip(r, 1 - low, 1 + high)) A logprob (arXiv:2506.13585 eq. 4-5): no token is dropped."""
    ratio = ratio.detach()
    weight = ratio.clamp(min=None if low is None else 1.0 - low, max=1.0 + high)
    above, below = ratio > weight, ratio < weight
    metrics = {"clip_fraction": above | below, "clip_fraction/low": below, "clip_fraction/high": above}
    return TokenLoss(-weight * advantages * logprobs, metrics)


def sapo(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> TokenLoss:
    """-A f(r), f(r) = 4 / tau * sigmoid(tau (r - 1)): a soft gate, widest at r = 1 (arXiv:2511.20347).

    The reported gate is f'(r) = 4 s (1 - s), the share of the gradient that passes.
    """
    tau = torch.where(advantages > 0, tau_positive, tau_negative).to(ratio.dtype)
    s = torch.sigmoid(tau * (ratio - 1.0))
    return TokenLoss(-advantages * s * 4.0 / tau, {"sapo/gate": 4.0 * s * (1.0 - s)})


def drift(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    positive: float = 2.0,
    negative: float = 0.6,
) -> TokenLoss:
    """-(A r - drift), a penalty for moving that was learned, in its closed form (arXiv:2210.05639):

    A >= 0:  max(0, x - positive tanh(x / positive)) with x = A (r - 1)
    A < 0:   max(0, x - negative tanh(x / negative)) with x = A log r

    Where the update has gone the right way (x > 0) the penalty grows smoothly, and that of bad tokens without
    bound: one that has become too unlikely is pulled back. Where it has gone the wrong way there is none, as
    with a clip. The paper calls it Discovered Policy Optimisation.
    """
    bound = torch.where(advantages < 0, negative, positive).to(ratio.dtype)
    moved = advantages * torch.where(advantages < 0, ratio.log(), ratio - 1.0)
    penalty = torch.relu(moved - bound * torch.tanh(moved / bound))
    return TokenLoss(-advantages * ratio + penalty, {"drift/penalty": penalty.detach()})


def reinforce(
    logprobs: Float[Tensor, " N"], ratio: Float[Tensor, " N"], advantages: Float[Tensor, " N"]
) -> TokenLoss:
    """-A logprob (REINFORCE): the ratio is not used."""
    return TokenLoss(-advantages * logprobs, {})


def gold(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    floor: float = 0.1,
) -> TokenLoss:
    """-max(p, floor) A logprob with p the policy's probability, a constant (GOLD, arXiv:2009.07839).

    Tokens that the policy already finds likely weigh more: their probability takes the place of the ratio to
    the policy that made the data, whose probabilities are not known.
    """
    weight = logprobs.detach().exp().clamp(min=floor)
    return TokenLoss(-weight * advantages * logprobs, {"clip_fraction": weight <= floor})


def reinforce_against(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    coef: float,
) -> TokenLoss:
    """-A logprob + coef log r, the second term for any advantage (A-LoL KL, arXiv:2305.14718).

    With r the ratio to the reference, and samples of the policy, coef log r is a KL. With samples of the data
    its gradient only makes them less likely: coef must be small beside the advantages.
    """
    return TokenLoss(-advantages * logprobs + coef * ratio.log(), {})


def advantage_weighted(
    logprobs: Float[Tensor, " N"],
    ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
    max_weight: float = 20.0,
) -> TokenLoss:
    """-min(exp(A / temperature), max_weight) logprob (AWR, arXiv:1910.00177): weighted imitation.

    A negative advantage still has a small positive weight, so no token is pushed down. An advantage of 0 has
    a weight of 1, not 0.
    """
    weight = awr_weights(advantages, temperature=temperature, max_weight=max_weight)
    return TokenLoss(-weight * logprobs, {"clip_fraction": weight >= max_weight})
