"""Shared-prefix attention for training: a prompt's keys and values are computed once per group.

A completion token sees its prompt and the earlier tokens of its own completion. Its attention has two parts,
one over the prompt (all completions of the group in one call) and a causal one over its own completion, which
are merged by their log-sum-exps. The backward pass calls the kernel's backward once per part, each time with
the merged output and log-sum-exp, which makes both gradients exact. It serves any causal model whose
attention is full and comes from transformers' `AttentionInterface` (name `SHARED_PREFIX`); the keyword
`spans` says where the groups lie.

That is done on a CPU; on a GPU `varlen.py` makes one call for all groups. Two choices are particular to
torch's flash-attention kernel for CPUs, both by measurement (docs/performance.md):

1. Up to `FLOAT32_UP_TO` keys the kernel is faster in float32 than in bfloat16 (the backward up to three
   times), so short sequences are computed in float32. Tensors kept for the backward stay in the model's own
   type.
2. Query heads that share a key head are folded into `r` rows of one head for each token (`r` = Hq / Hk).
   Causal attention then needs a mask tensor, with which the kernel skips no work, so this pays up to
   `FOLD_UP_TO` tokens only. For longer sequences keys are repeated for each query head instead, and `r` = 1.

Models with sliding windows use the same function with one completion per group: on the CPU a loop over
sequences.

Letters of shapes in this file:

    T       tokens of all packed groups          D       head size
    Hq, Hk  query heads, key heads               K, r    heads in the kernel, query rows per token: K r = Hq
    C       tokens of one segment                B, L    sequences of a segment, length of the longest
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
from rlhf.models.layers.masks import register_mask, window_of
from rlhf.models.layers.varlen import one_sequence, packed_attention
from rlhf.models.packing import GroupSpan
from rlhf.torch_typed import unflatten

SHARED_PREFIX = "rlhf_shared_prefix"
FOLD_UP_TO = 256
FLOAT32_UP_TO = 512

_BEYOND_SOFTMAX = ("softcap", "s_aux", "position_bias")
"""Arguments by which a layer of transformers asks for more than a softmax."""


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Registers an attention function with transformers; models select it by `name`."""
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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of packed groups, called by a layer of transformers.

    Query `[1, Hq, T, D]`, key and value `[1, Hk, T, D]` -> `[1, T, Hq, D]` and no attention weights. Raises
    NotImplementedError: the layer needs more than a softmax, or values of another size than its keys.
    """
    assert query.shape[0] == 1
    window = window_of(attention_mask)
    extra = [name for name in _BEYOND_SOFTMAX if others.get(name) is not None]
    if value.shape[-1] != query.shape[-1]:
        extra.append("values of another size than its keys")
    if extra:
        raise NotImplementedError(f"its attention has {', '.join(extra)}")
    q, k, v = query[0], key[0], value[0]
    if query.is_cuda:
        output = packed_attention(q, k, v, spans, scale=scaling, window=window)
    else:
        output = attention_by_groups(q, k, v, spans, scale=scaling, window=window)
    return output.transpose(0, 1)[None], None


register_attention(SHARED_PREFIX, shared_prefix_attention)
register_mask(SHARED_PREFIX)


def attention_by_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[GroupSpan],
    *,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """`varlen.packed_attention` group by group, with the CPU's kernel: `[Hq, T, D]`.

    Raises NotImplementedError: a `window` is shorter than a sequence, and a group has several completions.
    """
    lengths = [span.end - span.start for span in spans]
    if window is None or window >= max(span.longest for span in spans):
        return cast(Any, _PackedAttention).apply(query, key, value, tuple(spans), scale).transpose(0, 1)
    if any(len(span.completions) > 1 for span in spans):
        raise NotImplementedError(f"its attention has a sliding window of {window} tokens")
    sequences = zip(*(torch.split(t, lengths, dim=1) for t in (query, key, value)), strict=True)
    return torch.cat([one_sequence(*qkv, scale=scale, window=window) for qkv in sequences], dim=1)


class _PackedAttention(torch.autograd.Function):
    """Query `[Hq, T, D]`, key and value `[Hk, T, D]`, spans, scale -> `[T, Hq, D]`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        query, key, value, spans, scale = args
        inputs = _KernelInputs.of(query, key, value, spans)
        out = _empty_tokens_first(query)  # [T, Hq, D]
        lses: list[Tensor] = []
        for segment in inputs.segments:
            q, k, v = (t[:, segment.tokens] for t in (inputs.q, inputs.k, inputs.v))
            part, lse = _causal_attention(q, k, v, segment.rows, scale)  # [C, r, K, D], [C, r, K]
            if segment.prompt:
                k, v = (t[:, segment.prompt] for t in (inputs.k, inputs.v))
                part, lse = _merge_parts(part, lse, *_prompt_attention(q, k, v, scale))
            _write_heads(part, out[segment.tokens])
            lses.append(lse)
        # the inputs as they came, not those in float32 or with repeated keys, which take more memory
        ctx.save_for_backward(query, key, value, out, *lses)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *lses = ctx.saved_tensors
        inputs = _KernelInputs.of(query, key, value, ctx.spans)
        grad, out = (inputs.like_query(t.transpose(0, 1)) for t in (grads[0], out))  # [K, T, r, D]
        d_query = _empty_tokens_first(query)  # [T, Hq, D]
        d_k, d_v = _empty_tokens_first(inputs.k), _empty_tokens_first(inputs.v)  # [T, K, D]
        for segment, lse in zip(inputs.segments, lses, strict=True):
            # `g` and `o` are of the merged attention: with its log-sum-exp, the kernel's backward for each
            # part weighs keys by their share of the whole softmax, so the gradients of the parts add up
            q, g, o = (t[:, segment.tokens] for t in (inputs.q, grad, out))
            k, v = (t[:, segment.tokens] for t in (inputs.k, inputs.v))
            d_q, d_k[segment.tokens], d_v[segment.tokens] = _causal_backward(
                g, q, k, v, o, lse, segment.rows, ctx.scale
            )
            if segment.prompt:
                k, v = (t[:, segment.prompt] for t in (inputs.k, inputs.v))
                more = _prompt_backward(g, q, k, v, o, lse, ctx.scale)
                # the prompt's own segment came before this one and has written its part of these gradients
                for total, part in zip((d_q, d_k[segment.prompt], d_v[segment.prompt]), more, strict=True):
                    total += part
            _write_heads(d_q, d_query[segment.tokens])
        # sums the gradients of keys that were repeated for each query head
        d_key, d_value = (unflatten(d, 1, (len(key), -1)).sum(2).to(key.dtype) for d in (d_k, d_v))
        return *(t.transpose(0, 1) for t in (d_query, d_key, d_value)), None, None


@dataclass(frozen=True, slots=True, eq=False)
class _KernelInputs:
    """Queries, keys and values as the kernel takes them: query heads folded or keys repeated, in its type.

    Results for a segment are `[C, r, K, D]` for its queries and `[C, K, D]` for its keys.
    """

    segments: tuple[_Segment, ...]
    q: Tensor  # [K, T, r, D]
    k: Tensor  # [K, T, D]
    v: Tensor  # [K, T, D]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, spans: tuple[GroupSpan, ...]) -> _KernelInputs:
        segments = _segments(spans, query.device)
        repeats = query.shape[0] // key.shape[0]
        folds = max(segment.rows.longest for segment in segments) <= FOLD_UP_TO
        in_float32 = max(segment.most_keys for segment in segments) <= FLOAT32_UP_TO
        dtype = torch.promote_types(query.dtype, torch.float32) if in_float32 else query.dtype
        if not folds:
            key, value = (t.repeat_interleave(repeats, 0) for t in (key, value))
        q = _fold_heads(query, repeats if folds else 1, dtype)
        return cls(segments, q, key.to(dtype), value.to(dtype))

    def like_query(self, x: Tensor) -> Tensor:
        """`[Hq, T, D]` -> `[K, T, r, D]`, in the layout and type of `q`."""
        return _fold_heads(x, self.q.shape[2], self.q.dtype)


def _fold_heads(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`[Hq, T, D]` -> contiguous `[K, T, r, D]` of `dtype`, with `r` = `rows`."""
    x = unflatten(x, 0, (-1, rows)).transpose(1, 2)
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _empty_tokens_first(like: Tensor) -> Tensor:
    """An uninitialised `[T, heads, D]`, of the type of `like` `[heads, T, D]`."""
    return torch.empty_like(like.transpose(0, 1), memory_format=torch.contiguous_format)


def _write_heads(found: Tensor, into: Tensor) -> None:
    """Writes results for queries `[C, r, K, D]` into `[C, Hq, D]`, undoing `_fold_heads`."""
    unflatten(into, 1, (-1, found.shape[1])).copy_(found.transpose(1, 2))


class _PaddedRows:
    """Converts B sequences that lie back to back to right-padded rows of the longest length L, and back.

    Under a causal mask no real token sees the padding, because it is on the right.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)  # B, L
        index = torch.arange(self.longest, device=device)
        length = torch.tensor(lengths, device=device)
        start = length.cumsum(0) - length
        real = index < length[:, None]  # [B, L]
        # padding repeats the first token of its sequence
        self._source = torch.where(real, start[:, None] + index, start[:, None]).flatten()  # [B L]
        self._target = real.flatten().nonzero()[:, 0]  # [C]
        self.padding: Tensor | None = None if real.all() else ~real  # [B, L]

    def split(self, x: Tensor) -> Tensor:
        """`[K, C, ...]` -> `[B, K, L, ...]`"""
        x = x if self.padding is None else x[:, self._source]
        return unflatten(x, 1, (self.count, self.longest)).transpose(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """`[B, L, ...]` -> `[C, ...]`"""
        x = x.flatten(0, 1)
        return x if self.padding is None else x[self._target]


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """Sequences that lie back to back in the packed tokens: a prompt, or completions that see one prompt."""

    tokens: slice
    rows: _PaddedRows
    prompt: slice | None
    """The prompt of these completions; None: the segment sees itself alone."""

    @property
    def most_keys(self) -> int:
        """The largest number of keys in any of its calls of the kernel."""
        return max(self.rows.longest, 0 if self.prompt is None else self.prompt.stop - self.prompt.start)


@lru_cache(maxsize=8)
def _segments(spans: tuple[GroupSpan, ...], device: torch.device) -> tuple[_Segment, ...]:
    """Two segments per group, its prompt and then its completions; one for a group of one completion."""
    segments: list[_Segment] = []
    for span in spans:
        if len(span.completions) == 1:
            whole = slice(span.start, span.end)
            segments.append(_Segment(whole, _PaddedRows([span.end - span.start], device), None))
            continue
        prompt = slice(span.start, span.start + span.prompt)
        segments.append(_Segment(prompt, _PaddedRows([span.prompt], device), None))
        completions = slice(prompt.stop, span.end)
        segments.append(_Segment(completions, _PaddedRows(span.completions, device), prompt))
    return tuple(segments)


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: _PaddedRows, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Causal attention of each sequence to itself: output `[C, r, K, D]` and log-sum-exp `[C, r, K]`.

    q `[K, C, r, D]`, k and v `[K, C, D]`.
    """
    folded = q.shape[2]  # r
    q, k, v = rows.split(q).flatten(2, 3), rows.split(k), rows.split(v)  # [B, K, L r, D], [B, K, L, D]
    out, lse = attention_forward(q, k, v, causal=True, folded=folded, scale=scale)
    shape = rows.longest, folded
    return rows.join(unflatten(out.transpose(1, 2), 1, shape)), rows.join(unflatten(lse.mT, 1, shape))


def _causal_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: _PaddedRows,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_causal_attention`: `[C, r, K, D]` of q, `[C, K, D]` of k and v.

    grad, q and out `[K, C, r, D]`, k and v `[K, C, D]`, lse `[C, r, K]`; out and lse of the merged attention.
    """
    folded = q.shape[2]  # r
    grad, q, out, lse = (rows.split(t).flatten(2, 3) for t in (grad, q, out, lse.permute(2, 0, 1)))
    k, v = rows.split(k), rows.split(v)
    if rows.padding is not None:
        padding = rows.padding.repeat_interleave(folded, 1)[:, None]  # [B, 1, L r]
        # padding has the log-sum-exp of another token: its weights exp(score - lse) could overflow, and
        # infinity times a gradient of 0 is NaN
        grad, lse = grad.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, float("inf"))
    d_q, d_k, d_v = attention_backward(grad, q, k, v, out, lse, causal=True, folded=folded, scale=scale)
    d_q = unflatten(d_q.transpose(1, 2), 1, (rows.longest, folded))  # [B, L, r, K, D]
    return rows.join(d_q), rows.join(d_k.transpose(1, 2)), rows.join(d_v.transpose(1, 2))


def _prompt_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of all completion tokens to all of the prompt's; shapes as in `_causal_attention`.

    Every row sees every key, so completion tokens and folded heads are rows of one call: `[1, K, C r, D]`.
    """
    out, lse = attention_forward(q.flatten(1, 2)[None], k[None], v[None], causal=False, scale=scale)
    shape = q.shape[1:3]  # C, r
    return unflatten(out[0].transpose(0, 1), 0, shape), unflatten(lse[0].T, 0, shape)


def _prompt_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_prompt_attention`; shapes as in `_causal_backward`, with the prompt's k and v."""
    shape = q.shape[1:3]  # C, r
    grad, q, out, lse = (t.flatten(1, 2)[None] for t in (grad, q, out, lse.permute(2, 0, 1)))
    found = attention_backward(grad, q, k[None], v[None], out, lse, causal=False, scale=scale)
    d_q, d_k, d_v = (t[0].transpose(0, 1) for t in found)
    return unflatten(d_q, 0, shape), d_k, d_v


def _merge_parts(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of the keys of two parts, and its log-sum-exp."""
    out, other = out.to(lse.dtype), other.to(lse.dtype)
    return merge(other, other_lse, out, lse), torch.logaddexp(lse, other_lse)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, folded: int = 1, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[B, K, L r, D]` and log-sum-exp `[B, K, L r]`, by the CPU's flash-attention kernel.

    q `[B, K, L r, D]`, k and v `[B, K, L, D]`. `folded`: `r`, the rows of q that belong to one token.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = _causal_mask(k.shape[2], folded, q.dtype) if causal and folded > 1 else None
    out, lse = forward(q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=scale)
    # a kernel that returns the log-sum-exp as [B, L r, K] is served too
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
    """Gradients of q, k and v, given output and log-sum-exp of the whole softmax, not only of these keys."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = _causal_mask(k.shape[2], folded, q.dtype) if causal and folded > 1 else None
    lse = lse.contiguous()
    return backward(grad, q, k, v, out, lse, 0.0, causal and mask is None, attn_mask=mask, scale=scale)


@lru_cache(maxsize=32)
def _causal_mask(length: int, folded: int, dtype: torch.dtype) -> Tensor:
    """Additive mask `[1, 1, L r, L]`: 0 where a query row sees a key, minus infinity elsewhere."""
    seen = torch.ones(length, length, dtype=torch.bool).tril().repeat_interleave(folded, 0)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]
