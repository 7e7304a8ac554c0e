"""Sums over the sequences of a packed batch, without waiting for the device to say how many there are."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor


def sequence_sum(x: Float[Tensor, " N"], sequence: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Gives every token the sum of `x` over its own sequence.

    Ids are in `0 .. S-1` and S <= N, so a buffer of N entries is large enough, and S need not be read from
    the device.
    """
    return x.new_zeros(len(sequence)).index_add(0, sequence, x)[sequence]


def sequence_tokens(
    mask: Bool[Tensor, " N"], sequence: Int[Tensor, " N"], like: Tensor
) -> Float[Tensor, " N"]:
    """Gives every token the number of unmasked tokens of its sequence, at least 1, in the dtype of `like`."""
    return sequence_sum(mask.to(like.dtype), sequence).clamp(min=1)


def in_last_turn(turn: Int[Tensor, " N"], sequence: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether each token is of the last turn of its sequence; turns are counted from 0."""
    last = turn.new_zeros(len(sequence)).scatter_reduce(0, sequence, turn, "amax")
    return turn == last[sequence]
