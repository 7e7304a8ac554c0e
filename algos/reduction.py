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
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algos.segments import in_last_turn, sequence_tokens
from rlhf.types import Counts


@dataclass(frozen=True, slots=True)
class Where:
    """What the tokens of a microbatch are, all `[N]`, and the counts of the whole update."""

    mask: Bool[Tensor, " N"]
    """True where the policy chose the token and learns from it."""
    sequence: Int[Tensor, " N"]
    """Ids of the sequences, `0 .. S-1`, contiguous; a sequence is never cut."""
    turn: Int[Tensor, " N"]
    """Number of the policy's turn in its sequence, from 0."""
    counts: Counts


Reduction = Callable[[Tensor, Where], Tensor]
"""`(loss[N], where) -> scalar`."""


def token_mean(loss: Float[Tensor, " N"], where: Where) -> Float[Tensor, ""]:
    """Sum over all tokens / number of tokens (DAPO, arXiv:2503.14476 eq. 8): long completions weigh more."""
    return token_sum(loss, where) / max(where.counts.tokens, 1)


def sequence_mean_token_mean(loss: Float[Tensor, " N"], where: Where) -> Float[Tensor, ""]:
    """Mean over sequences of the mean over their tokens (GRPO, arXiv:2402.03300 eq. 3)."""
    share = loss / sequence_tokens(where.mask, where.sequence, loss)
    return token_sum(share, where) / max(where.counts.sequences, 1)


def sequence_mean_token_sum(loss: Float[Tensor, " N"], where: Where) -> Float[Tensor, ""]:
    """Mean over sequences of the sum over tokens: a completion is one action (RLOO, arXiv:2402.14740)."""
    return token_sum(loss, where) / max(where.counts.sequences, 1)


def own_mean_token_sum(loss: Float[Tensor, " N"], where: Where) -> Float[Tensor, ""]:
    """Sum over tokens / number of sequences that the policy sampled: for losses that are 0 on all others."""
    return token_sum(loss, where) / max(where.counts.sampled, 1)


def sequence_mean_constant(loss: Float[Tensor, " N"], where: Where, *, max_tokens: int) -> Float[Tensor, ""]:
    """Mean over sequences of the sum over tokens / `max_tokens`, a constant (Dr. GRPO, arXiv:2503.20783)."""
    return sequence_mean_token_sum(loss, where) / max_tokens


def token_sum(loss: Float[Tensor, " N"], where: Where) -> Float[Tensor, ""]:
    """Sum over all tokens."""
    return loss.masked_fill(~where.mask, 0.0).sum()


def turn_means(weight: float) -> Reduction:
    """`weight` * mean over the tokens of turns before the last + mean over those of the last (DTPO).

    Each is a mean over the whole update, so that short turns that call a tool are not outweighed by the long
    ones that answer (arXiv:2512.03794). The only turn of a sequence is its last, as in the paper's code.
    Either mean is 0 where it has no tokens.
    """
    if weight < 0:
        raise ValueError(f"the weight of the turns before the last one must be 0 or more, got {weight}")

    def reduction(loss: Float[Tensor, " N"], where: Where) -> Float[Tensor, ""]:
        last = in_last_turn(where.turn, where.sequence)
        earlier = token_sum(loss, replace(where, mask=where.mask & ~last)) / max(
            where.counts.earlier_tokens, 1
        )
        answers = token_sum(loss, replace(where, mask=where.mask & last)) / max(where.counts.last_tokens, 1)
        return weight * earlier + answers

    return reduction
