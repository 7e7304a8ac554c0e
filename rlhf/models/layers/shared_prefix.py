"""Shared-prefix attention for training: a prompt's keys and values are computed once a group.

A completion token sees its prompt and what stands before it in its own completion. Its attention is merged
from two parts by their log-sum-exps, one over the prompt (all completions of the group in one call) and one
causal over its own completion; the backward calls the kernel's backward twice with the merged output and
log-sum-exp, which makes both gradients exact. The model is any causal, full-attention one that takes its
attention from transformers' `AttentionInterface` (name `SHARED_PREFIX`); the keyword `spans` is the layout.

That is the CPU's way; on a GPU `varlen.py` makes one call for all groups. What is particular to torch's
flash-attention kernel for CPUs, each by measurement (docs/performance.md):

1. Up to `WIDE_UP_TO` keys it is faster in float32 than in bfloat16, the backward up to three times, so short
   problems are computed in float32. What is kept for the backward stays in the model's own type.
2. Query heads that share keys become more rows of one query, `r` of them at each token. Behind the causal
   mask, which then hides nothing from the kernel's work, that pays up to `FOLD_UP_TO` tokens; beyond, keys
   are repeated and `r` = 1.

Models with sliding windows take the same road with every completion behind a prompt of its own: on the CPU a
loop over sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from rlhf.kernels.attention_parts import merge
from rlhf.models.layers.varlen import one_sequence, packed_attention
from rlhf.models.packing import GroupSpan
from rlhf.torch_typed import unflatten

SHARED_PREFIX = "rlhf_shared_prefix"
FOLD_UP_TO = 256
WIDE_UP_TO = 512

_BEYOND_SOFTMAX = ("softcap", "s_aux", "position_bias")


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Offers an attention function to the models of transformers under a name."""
    # its annotations are too incomplete for a strict check
    cast(Any, transformers).AttentionInterface.register(name, function)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: tuple[GroupSpan, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Packed groups: query `[1, heads, T, D]`, key, value `[1, kv_heads, T, D]` -> `[1, T, heads, D]`.

    Raises NotImplementedError when the layer asks for more than a softmax.
    """
    assert query.shape[0] == 1 and attention_mask is None
    extra = [name for name in _BEYOND_SOFTMAX if others.get(name) is not None]
    if value.shape[-1] != query.shape[-1]:
        extra.append("values of another size than its keys")
    if extra:
        raise NotImplementedError(f"its attention has {', '.join(extra)}")
    q, k, v = query[0], key[0], value[0]
    if query.is_cuda:
        output = packed_attention(q, k, v, spans, scale=scaling, window=sliding_window)
    else:
        output = attention_by_groups(q, k, v, spans, scale=scaling, window=sliding_window)
    return output.transpose(0, 1)[None], None


register_attention(SHARED_PREFIX, shared_prefix_attention)


def attention_by_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[GroupSpan],
    *,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """As `varlen.packed_attention`, group by group, with the CPU's kernel; a window needs groups of one."""
    lengths = [span.end - span.start for span in spans]
    if window is None or window >= max(lengths):
        return cast(Any, _Packed).apply(query, key, value, tuple(spans), scale).transpose(0, 1)
    assert all(len(span.completions) == 1 for span in spans), "a sliding window over a shared prompt"
    parts = zip(*(torch.split(t, lengths, dim=1) for t in (query, key, value)), strict=True)
    return torch.cat([one_sequence(*part, scale=scale, window=window) for part in parts], dim=1)


class _Packed(torch.autograd.Function):
    """Query `[heads, T, D]`, key and value `[kv_heads, T, D]`, spans, scale -> `[T, heads, D]`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        query, key, value, spans, scale = args
        problem = _Problem.of(query, key, value, spans)
        out = _tokens_first(query)
        lses: list[Tensor] = []
        for piece in problem.pieces:
            q, k, v = (t[:, piece.own] for t in (problem.q, problem.k, problem.v))
            found, lse = _own(q, k, v, piece.rows, scale)
            if piece.prompt:
                k, v = (t[:, piece.prompt] for t in (problem.k, problem.v))
                found, lse = _merged(found, lse, *_to_prompt(q, k, v, scale))
            _put(found, out[piece.own])
            lses.append(lse)
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *lses = ctx.saved_tensors
        problem = _Problem.of(query, key, value, ctx.spans)
        grad, out = (problem.queries(t.transpose(0, 1)) for t in (grads[0], out))
        d_query = _tokens_first(query)
        d_k, d_v = _tokens_first(problem.k), _tokens_first(problem.v)
        for piece, lse in zip(problem.pieces, lses, strict=True):
            q, g, o = (t[:, piece.own] for t in (problem.q, grad, out))
            k, v = (t[:, piece.own] for t in (problem.k, problem.v))
            d_q, d_k[piece.own], d_v[piece.own] = _own_backward(g, q, k, v, o, lse, piece.rows, ctx.scale)
            if piece.prompt:
                k, v = (t[:, piece.prompt] for t in (problem.k, problem.v))
                more = _to_prompt_backward(g, q, k, v, o, lse, ctx.scale)
                # the prompt by itself came before
                for total, part in zip((d_q, d_k[piece.prompt], d_v[piece.prompt]), more, strict=True):
                    total += part
            _put(d_q, d_query[piece.own])
        d_key, d_value = (unflatten(d, 1, (len(key), -1)).sum(2).to(key.dtype) for d in (d_k, d_v))
        return *(t.transpose(0, 1) for t in (d_query, d_key, d_value)), None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """Queries `[K, T, r, D]`, keys and values `[K, T, D]` in the type that is computed with.

    Results of a piece of C tokens are `[C, r, K, D]` for its queries and `[C, K, D]` for its keys.
    """

    pieces: tuple[_Piece, ...]
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, spans: tuple[GroupSpan, ...]) -> _Problem:
        pieces = _pieces(spans, query.device)
        repeats = query.shape[0] // key.shape[0]
        folds = max(piece.rows.longest for piece in pieces) <= FOLD_UP_TO
        wide = max(piece.keys for piece in pieces) <= WIDE_UP_TO
        dtype = torch.promote_types(query.dtype, torch.float32) if wide else query.dtype
        if not folds:
            key, value = (t.repeat_interleave(repeats, 0) for t in (key, value))
        q = _folded(query, repeats if folds else 1, dtype)
        return cls(pieces, q, key.to(dtype), value.to(dtype))

    def queries(self, x: Tensor) -> Tensor:
        """Of the shape of the query, as that lies here."""
        return _folded(x, self.q.shape[2], self.q.dtype)


def _folded(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    x = unflatten(x, 0, (-1, rows)).transpose(1, 2)
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _tokens_first(like: Tensor) -> Tensor:
    """Room for `[T, heads, D]`, given `[heads, T, D]`."""
    return torch.empty_like(like.transpose(0, 1), memory_format=torch.contiguous_format)


def _put(found: Tensor, into: Tensor) -> None:
    """Results for queries, `[C, r, K, D]`, as `[C, heads, D]`."""
    unflatten(into, 1, (-1, found.shape[1])).copy_(found.transpose(1, 2))


class _Rows:
    """Sequences back to back `[K, C, ...]` <-> one right-padded row each `[G, K, longest, ...]`.

    Behind a causal mask right padding is never looked at by a real token.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        index = torch.arange(self.longest, device=device)
        length = torch.tensor(lengths, device=device)
        start = length.cumsum(0) - length
        real = index < length[:, None]
        self._source = torch.where(real, start[:, None] + index, start[:, None]).flatten()
        self._target = real.flatten().nonzero()[:, 0]
        self.padding: Tensor | None = None if real.all() else ~real
        """`[G, longest]`"""

    def split(self, x: Tensor) -> Tensor:
        x = x if self.padding is None else x[:, self._source]
        return unflatten(x, 1, (self.count, self.longest)).transpose(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """`[G, longest, ...]` -> `[C, ...]`"""
        x = x.flatten(0, 1)
        return x if self.padding is None else x[self._target]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Sequences that lie back to back in the packed tokens, and the prompt that all of them see."""

    own: slice
    rows: _Rows
    prompt: slice | None

    @property
    def keys(self) -> int:
        """Of one call, at most."""
        return max(self.rows.longest, 0 if self.prompt is None else self.prompt.stop - self.prompt.start)


@lru_cache(maxsize=8)
def _pieces(spans: tuple[GroupSpan, ...], device: torch.device) -> tuple[_Piece, ...]:
    """Each prompt by itself and then the completions behind it; a group of one is a single sequence."""
    pieces: list[_Piece] = []
    for span in spans:
        if len(span.completions) == 1:
            pieces.append(_Piece(slice(span.start, span.end), _Rows([span.end - span.start], device), None))
            continue
        prompt = slice(span.start, span.start + span.prompt)
        pieces.append(_Piece(prompt, _Rows([span.prompt], device), None))
        pieces.append(_Piece(slice(prompt.stop, span.end), _Rows(span.completions, device), prompt))
    return tuple(pieces)


def _own(q: Tensor, k: Tensor, v: Tensor, rows: _Rows, scale: float | None) -> tuple[Tensor, Tensor]:
    """Each sequence by itself, causal: output `[C, r, K, D]` and log-sum-exp `[C, r, K]`."""
    q, k, v, folded = rows.split(q).flatten(2, 3), rows.split(k), rows.split(v), q.shape[2]
    out, lse = attention_forward(q, k, v, causal=True, folded=folded, scale=scale)
    shape = rows.longest, folded
    return rows.join(unflatten(out.transpose(1, 2), 1, shape)), rows.join(unflatten(lse.mT, 1, shape))


def _own_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: _Rows, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    folded = q.shape[2]
    grad, q, out, lse = (rows.split(t).flatten(2, 3) for t in (grad, q, out, lse.permute(2, 0, 1)))
    k, v = rows.split(k), rows.split(v)
    if rows.padding is not None:
        padding = rows.padding.repeat_interleave(folded, 1)[:, None]
        # a row of padding belongs to no softmax: without this its weight could overflow before it is dropped
        grad, lse = grad.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, float("inf"))
    d_q, d_k, d_v = attention_backward(grad, q, k, v, out, lse, causal=True, folded=folded, scale=scale)
    d_q = unflatten(d_q.transpose(1, 2), 1, (rows.longest, folded))
    return rows.join(d_q), rows.join(d_k.transpose(1, 2)), rows.join(d_v.transpose(1, 2))


def _to_prompt(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """All completions to the prompt, as `_own` gives it."""
    out, lse = attention_forward(q.flatten(1, 2)[None], k[None], v[None], causal=False, scale=scale)
    shape = q.shape[1:3]
    return unflatten(out[0].transpose(0, 1), 0, shape), unflatten(lse[0].T, 0, shape)


def _to_prompt_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = q.shape[1:3]
    grad, q, out, lse = (t.flatten(1, 2)[None] for t in (grad, q, out, lse.permute(2, 0, 1)))
    found = attention_backward(grad, q, k[None], v[None], out, lse, causal=False, scale=scale)
    d_q, d_k, d_v = (t[0].transpose(0, 1) for t in found)
    return unflatten(d_q, 0, shape), d_k, d_v


def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, and its log-sum-exp."""
    out, other = out.to(lse.dtype), other.to(lse.dtype)
    return merge(other, other_lse, out, lse), torch.logaddexp(lse, other_lse)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, folded: int = 1, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[B, heads, L, D]` and log-sum-exp `[B, heads, L]`, by the CPU's flash-attention kernel.

    `folded`: rows of the query that stand at one token.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = _mask(k.shape[2], folded, q.dtype) if causal and folded > 1 else None
    out, lse = forward(q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=scale)
    return out, lse if lse.shape[1] == q.shape[1] else lse.transpose(1, 2)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    folded: int = 1,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given output and log-sum-exp of the whole softmax (not of this part alone)."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = _mask(k.shape[2], folded, q.dtype) if causal and folded > 1 else None
    lse = lse.contiguous()
    return backward(grad, q, k, v, out, lse, 0.0, causal and mask is None, attn_mask=mask, scale=scale)


@lru_cache(maxsize=32)
def _mask(length: int, folded: int, dtype: torch.dtype) -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool).tril().repeat_interleave(folded, 0)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]
