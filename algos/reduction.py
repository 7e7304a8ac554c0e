"""Reductions: from the losses of tokens to one number, a mean over tokens or sequences of the whole update.

Every function divides a sum by a count of the *whole update* (all ranks, all microbatches), which the caller
gives. So cutting a batch differently changes neither the loss nor its gradient. The tokens of one sequence
are counted here, because a sequence is never cut. A sequence without an unmasked token is not counted and
adds exactly 0.

Differences from the papers and their code: 1. the published codes divide each microbatch by its own number of
tokens, which is not the mean they print; 2. no 1e-8 is added to a denominator: counts are whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algos.segments import sequence_tokens
from rlhf.types import Counts

Reduction = Callable[[Tensor, Tensor, Tensor, Counts], Tensor]
"""`(loss[N], mask[N], sequence[N], counts) -> scalar`."""


def token_mean(
    loss: Float[Tensor, " N"], mask: Bool[Tensor, " N"], sequence: Int[Tensor, " N"], counts: Counts
) -> Float[Tensor, ""]:
    """Sum over all tokens / number of tokens (DAPO, arXiv:2503.14476 eq. 8): long completions weigh more."""
    return token_sum(loss, mask, sequence, counts) / max(counts.tokens, 1)


def sequence_mean_token_mean(
    loss: Float[Tensor, " N"], mask: Bool[Tensor, " N"], sequence: Int[Tensor, " N"], counts: Counts
) -> Float[Tensor, ""]:
    """Mean over sequences of the mean over their tokens (GRPO, arXiv:2402.03300 eq. 3)."""
    share = loss / sequence_tokens(mask, sequence, loss)
    return token_sum(share, mask, sequence, counts) / max(counts.sequences, 1)


def sequence_mean_token_sum(
    loss: Float[Tensor, " N"], mask: Bool[Tensor, " N"], sequence: Int[Tensor, " N"], counts: Counts
) -> Float[Tensor, ""]:
    """Mean over sequences of the sum over tokens: a completion is one action (RLOO, arXiv:2402.14740)."""
    return token_sum(loss, mask, sequence, counts) / max(counts.sequences, 1)


def own_mean_token_sum(
    loss: Float[Tensor, " N"], mask: Bool[Tensor, " N"], sequence: Int[Tensor, " N"], counts: Counts
) -> Float[Tensor, ""]:
    """Sum over tokens / number of sequences that the policy sampled: for losses that are 0 on all others."""
    return token_sum(loss, mask, sequence, counts) / max(counts.sampled, 1)


def sequence_mean_constant(
    loss: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    sequence: Int[Tensor, " N"],
    counts: Counts,
    *,
    max_tokens: int,
) -> Float[Tensor, ""]:
    """Mean over sequences of the sum over tokens / `max_tokens`, a constant (Dr. GRPO, arXiv:2503.20783)."""
    return sequence_mean_token_sum(loss, mask, sequence, counts) / max_tokens


def token_sum(
    loss: Float[Tensor, " N"], mask: Bool[Tensor, " N"], sequence: Int[Tensor, " N"], counts: Counts
) -> Float[Tensor, ""]:
    """Sum over all tokens."""
    return loss.masked_fill(~mask, 0.0).sum()
