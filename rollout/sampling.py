"""Draws tokens from logits for the engines `native` and `hf`: temperature, truncation, seeded randomness.

Token `t` of sample `i` of a request is a function of the logits and of one number `uniform(seed, i, t)`:

    u = splitmix64(splitmix64(seed) + i, t) / 2^53      next token = the first v with CDF(v) > u * CDF(V)

so it depends neither on the other rows of the batch, nor on earlier draws, nor on the global generator.
splitmix64 is the generator of Steele, Lea and Flood (OOPSLA 2014): a counter times an odd constant,
finalised by two multiply-xorshift rounds. This differs from the usual way of sampling:

1. One uniform number per token and the inverse of the CDF, not V Gumbel or exponential variables.
2. The CDF is cumulated in two levels, in float64: blocks of `BLOCK` tokens, then within the block drawn.
3. Tokens of equal probability at the edge of top-k or top-p are kept together, so that the result does not
   depend on the order of a sort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf.rollout.engine import SamplingParams
from rlhf.tensors.candidates import Candidates

BLOCK = 128
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(word: int) -> int:
    """The int64 with the same 64 bits; torch multiplies int64 modulo 2^64."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shift_right(word: Int64[Tensor, " S"], bits: int) -> Int64[Tensor, " S"]:
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(state: Int64[Tensor, " S"], counter: Int64[Tensor, " S"] | int = 0) -> Int64[Tensor, " S"]:
    """Output number `counter` of the splitmix64 generator that starts at `state`; 64 bits in an int64."""
    word = state + (counter + 1) * _signed(_GOLDEN)
    for bits, factor in _ROUNDS:
        word = (word ^ _shift_right(word, bits)) * _signed(factor)
    return word ^ _shift_right(word, 31)


def stream_keys(seeds: Sequence[int], indices: Sequence[int], device: torch.device) -> Int64[Tensor, " S"]:
    """The key of each sample's random stream, different for other seeds and other samples of a request."""
    seed = torch.tensor([_signed(s) for s in seeds], dtype=torch.int64, device=device)
    return splitmix64(splitmix64(seed) + torch.tensor(indices, dtype=torch.int64, device=device))


def uniform(keys: Int64[Tensor, " S"], position: Int64[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Uniform random numbers in [0, 1), in float64: multiples of 2^-53."""
    return _shift_right(splitmix64(keys, position), 11).double() * 2.0**-53


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How each row of a batch is sampled. A field is None if it is switched off for every row."""

    keys: Int64[Tensor, " S"]
    temperature: Float[Tensor, " S"] | None
    greedy: Bool[Tensor, " S"] | None
    top_p: Float[Tensor, " S"] | None
    top_k: Int64[Tensor, " S"] | None
    min_p: Float[Tensor, " S"] | None = None
    return_candidates: Bool[Tensor, " S"] | None = None
    mixture: Float[Tensor, " S"] | None = None
    """Used before `sample`, by engines that mix the logits of two models."""

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        indices: Sequence[int],
        device: torch.device,
        mixtures: Sequence[float] = (),
    ) -> RowSampling:
        """The sampling of a batch in which row `r` is sample `indices[r]` of a request with `params[r]`.

        `mixtures`: the share of the reference in what each row is sampled from; empty: none in any.
        """

        def column(values: Sequence[float], off: float, dtype: torch.dtype) -> Tensor | None:
            return None if all(v == off for v in values) else torch.tensor(values, dtype=dtype, device=device)

        # greedy rows are not truncated, so that the log-prob is that of the whole distribution
        greedy = [p.temperature == 0 for p in params]
        return cls(
            keys=stream_keys([p.seed for p in params], indices, device),
            temperature=column([p.temperature or 1.0 for p in params], 1.0, torch.float32),
            greedy=column(greedy, False, torch.bool),
            top_p=column([p.top_p if p.temperature else 1.0 for p in params], 1.0, torch.float64),
            top_k=column([p.top_k if p.temperature else 0 for p in params], 0, torch.int64),
            min_p=column([p.min_p if p.temperature else 0.0 for p in params], 0.0, torch.float32),
            return_candidates=column([p.candidates_needed for p in params], False, torch.bool),
            mixture=column(mixtures, 0.0, torch.float32),
        )


class Drawn(NamedTuple):
    """The next token of each row."""

    tokens: Int64[Tensor, " S"]
    logprobs: Float[Tensor, " S"]
    """fp32, under the distribution that the token was drawn from."""
    candidates: Candidates | None = None
    """The tokens that truncation left, for rows with `return_candidates`."""

    def per_row(self) -> Iterator[tuple[int, float, Tensor | None]]:
        """The arguments of `Row.append` for each row, on the host."""
        drawn: tuple[Any, Any] = self.tokens, self.logprobs
        candidates = [None] * len(self.tokens) if self.candidates is None else self.candidates.each()
        return zip(*(x.tolist() for x in drawn), candidates, strict=True)


def sample(logits: Float[Tensor, "S V"], rows: RowSampling, position: Int64[Tensor, " S"]) -> Drawn:
    """Draws the next token of each row. `position` is the number of tokens in its completion so far."""
    if rows.temperature is not None:
        logits = logits.float() / rows.temperature[:, None]
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    truncated = _truncated_rows(rows)
    if truncated is not None:
        columns = (_at(column, truncated) for column in (rows.top_k, rows.top_p, rows.min_p))
        probs[truncated] = truncate(probs[truncated], *columns)
    tokens, total = _inverse_cdf(probs, uniform(rows.keys, position))
    if rows.greedy is not None:
        tokens = torch.where(rows.greedy, logits.argmax(-1), tokens)
    logprobs = (probs.gather(1, tokens[:, None])[:, 0] / total).log().float()
    return Drawn(
        tokens,
        logprobs,
        None if rows.return_candidates is None else _candidates(probs, tokens, rows.return_candidates),
    )


def _candidates(
    probs: Float[Tensor, "S V"], tokens: Int64[Tensor, " S"], rows: Bool[Tensor, " S"]
) -> Candidates:
    """The tokens with probability above 0, the drawn one first; none for rows that `rows` leaves out."""
    is_candidate = (probs > 0) & rows[:, None]
    sizes = is_candidate.sum(-1)
    owner, ids = is_candidate.nonzero(as_tuple=True)
    # in each row the first candidate and the drawn one change places
    starts = (sizes.cumsum(0) - sizes)[rows]
    drawn = (ids == tokens[owner]).nonzero()[:, 0]
    ids[drawn] = ids[starts]
    ids[starts] = tokens[rows]
    return Candidates(ids.int(), sizes).to(torch.device("cpu"))


def _truncated_rows(rows: RowSampling) -> Int64[Tensor, " R"] | None:
    if rows.top_k is None and rows.top_p is None and rows.min_p is None:
        return None
    active = torch.zeros_like(rows.keys, dtype=torch.bool)
    if rows.top_k is not None:
        active |= rows.top_k > 0
    if rows.top_p is not None:
        active |= rows.top_p < 1
    if rows.min_p is not None:
        active |= rows.min_p > 0
    return active.nonzero()[:, 0]


def _at(column: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if column is None else column[rows]


def truncate(
    probs: Float[Tensor, "R V"],
    top_k: Int64[Tensor, " R"] | None,
    top_p: Float[Tensor, " R"] | None,
    min_p: Float[Tensor, " R"] | None = None,
) -> Float[Tensor, "R V"]:
    """The probabilities with 0 for the tokens that truncation leaves out, not renormalised.

    Left out are first the tokens below `min_p` times the most probable one, then all but the `top_k` most
    probable (0: none), then all outside the smallest set whose share of the rest reaches `top_p`.
    """
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(-1, keepdim=True), 0.0)
    if top_k is None and top_p is None:
        return probs
    size = probs.shape[-1]
    count = probs.new_full((len(probs),), size, dtype=torch.int64)
    if top_k is not None:
        count = torch.where(top_k > 0, top_k.clamp(max=size), count)
    widest = int(count.max())
    ordered = probs.topk(widest).values if widest < size else probs.sort(-1, descending=True).values
    if top_p is not None:
        mass = ordered.cumsum(-1, dtype=torch.float64)
        wanted = mass.gather(1, count[:, None] - 1) * top_p[:, None]
        # a token stays if those before it do not reach the share yet, so the first one always stays
        count = torch.minimum(count, (mass - ordered < wanted).sum(-1))
    edge = ordered.gather(1, count.clamp(min=1)[:, None] - 1)
    return probs.masked_fill(probs < edge, 0.0)


def _inverse_cdf(
    probs: Float[Tensor, "S V"], u: Float[Tensor, " S"]
) -> tuple[Int64[Tensor, " S"], Float[Tensor, " S"]]:
    """The first token whose cumulative mass exceeds `u` times the total mass, and that total (float64)."""
    size = probs.shape[-1]
    full = size // BLOCK * BLOCK
    blocks: list[Tensor] = []
    if full:
        blocks.append(torch.sum(probs[:, :full].reshape(len(probs), -1, BLOCK), -1))
    if full < size:
        blocks.append(torch.sum(probs[:, full:], -1, keepdim=True))
    mass = torch.cat(blocks, -1).cumsum(-1, dtype=torch.float64)
    block, rest = _first_above(mass, u * mass[:, -1])
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=size - 1)).masked_fill_(columns >= size, 0.0)
    offset, _ = _first_above(inside.cumsum(-1, dtype=torch.float64), rest)
    # only NaN logits give an index beyond the vocabulary; the log-prob is then NaN too and shows it
    return (block * BLOCK + offset).clamp(max=size - 1), mass[:, -1]


def _first_above(
    mass: Float[Tensor, "S B"], target: Float[Tensor, " S"]
) -> tuple[Int64[Tensor, " S"], Float[Tensor, " S"]]:
    """The first column whose cumulative mass exceeds `target`, and `target` minus the mass before it.

    `target` is clamped below the total, so that rounding never picks a column without mass of its own.
    """
    whole = mass[:, -1]
    target = torch.minimum(target, torch.nextafter(whole, torch.zeros_like(whole)))
    column = torch.searchsorted(mass, target[:, None], right=True)[:, 0].clamp(max=mass.shape[-1] - 1)
    before = mass.gather(1, (column - 1).clamp(min=0)[:, None])[:, 0].masked_fill_(column == 0, 0.0)
    return column, target - before
