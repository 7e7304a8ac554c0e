"""The perception terms of PAPO (arXiv:2507.06448): a policy that looks differs from one that cannot.

    loss = policy - gamma * mean(kl) + eta * mean(entropy) + masked_eta * mean(masked_entropy)

The KL is maximised and both entropies are kept low: without them the KL is hacked by irrelevant tokens.
Differences from the paper: 1. the KL is k3 of the policy's own samples, exp(u) - u - 1 with u = masked -
plain log-probability, as in its code; its figure prints the inverted ratio. With masked log-probabilities
from before the update, as there, the masked entropy has no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.algos.kl import k3


class PerceptionTerms(NamedTuple):
    """Each `[N]`, 0 outside the loss mask."""

    kl: Tensor
    entropy: Tensor
    masked_entropy: Tensor


def perception_terms(
    logprobs: Float[Tensor, " N"],
    masked_logprobs: Float[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    *,
    max_kl: float | None = None,
) -> PerceptionTerms:
    """KL(policy || policy with the image masked) and the entropies of both, from the sampled tokens.

    `max_kl` caps the KL of a token (PAPO's code offers 0.2, off). Samples without an image: leave them out of
    the mask.
    """
    plain = logprobs.masked_fill(~loss_mask, 0.0)
    masked = masked_logprobs.masked_fill(~loss_mask, 0.0)
    kl = k3(plain, masked)
    return PerceptionTerms(kl if max_kl is None else kl.clamp(max=max_kl), -plain, -masked)
