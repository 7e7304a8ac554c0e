"""Shared-prefix attention for training: a prompt's keys and values are computed once a group.

A completion token sees its prompt and what stands before it in its own completion. Its attention is merged
from two parts by their log-sum-exps, one over the prompt (all completions of the group in one call) and one
causal over its own completion; the backward calls the kernel's backward twice with the merged output and
log-sum-exp, which makes both gradients exact. The model is any causal, full-attention one that takes its
attention from transformers' `AttentionInterface` (name `SHARED_PREFIX`); the keyword `spans` is the layout.

For short prompts concatenation is faster than merging (fewer, larger calls): prompts up to `CONCAT_BELOW`
tokens are put in front of each completion, and the gradient of the copies is added up by autograd.

That is the CPU's way; on a GPU `varlen.py` makes one call for all groups. Models with sliding windows take
the same road with every completion behind a prompt of its own: on the CPU a loop over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf.packing import GroupSpan
from rlhf.pretrained import register_attention
from rlhf.varlen import one_sequence, packed_attention

SHARED_PREFIX = "rlhf_shared_prefix"
CONCAT_BELOW = 128


_BEYOND_SOFTMAX = ("softcap", "s_aux", "position_bias")


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
    outputs: list[Tensor] = []
    # split, not sliced: the gradient of each slice would be as large as what it was cut from
    lengths = [span.end - span.start for span in spans]
    parts = zip(*(torch.split(t, lengths, dim=1) for t in (query, key, value)), strict=True)
    for span, (q, k, v) in zip(spans, parts, strict=True):
        if len(span.completions) == 1:
            outputs.append(one_sequence(q, k, v, scale=scale, window=window))
            continue
        assert window is None, "a sliding window over a shared prompt"
        repeats = q.shape[0] // k.shape[0]
        outputs += _group(q, k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0), span, scale)
    return torch.cat(outputs, dim=1)


def _group(q: Tensor, k: Tensor, v: Tensor, span: GroupSpan, scale: float | None) -> list[Tensor]:
    """One group, `[heads, prompt + completions, D]`: the output of the prompt, and of the completions."""
    parts = [span.prompt, sum(span.completions)]
    (q_p, q_c), (k_p, k_c), (v_p, v_c) = (torch.split(t, parts, dim=1) for t in (q, k, v))
    rows = _Rows(span.completions, q.device)
    short = span.prompt < CONCAT_BELOW
    # with three dimensions torch computes plain matrix products, with four in a kernel that keeps no weights
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale)
    prompt = attend(q_p, k_p, v_p) if short else attend(q_p[None], k_p[None], v_p[None])[0]
    if short:
        completions = _concatenated(q_c, (k_p, k_c), (v_p, v_c), rows, scale)
    else:
        completions = cast(Any, _Merged).apply(q_c, k_p, v_p, k_c, v_c, rows, scale)
    return [prompt, completions]


class _Rows:
    """Completions back to back `[heads, sum, D]` <-> one right-padded row each `[G, heads, longest, D]`.

    Behind a causal mask right padding is never looked at by a real token.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.count, self.longest = len(lengths), max(lengths)
        index = torch.arange(self.longest, device=device)
        length = torch.tensor(lengths, device=device)
        start = length.cumsum(0) - length
        self.real = index < length[:, None]
        self.source = torch.where(self.real, start[:, None] + index, 0).flatten()
        self.target = self.real.flatten().nonzero()[:, 0]
        self.even = bool(self.real.all())

    def split(self, x: Tensor) -> Tensor:
        x = x if self.even else x[:, self.source]
        return x.view(x.shape[0], self.count, self.longest, *x.shape[2:]).transpose(0, 1)

    def join(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).flatten(1, 2)
        return x if self.even else x[:, self.target]


def _concatenated(
    q: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], rows: _Rows, scale: float | None
) -> Tensor:
    def joined(prompt: Tensor, own: Tensor) -> Tensor:
        return torch.cat([prompt.expand(rows.count, -1, -1, -1), rows.split(own)], dim=2)

    prompt = keys[0].shape[1]
    mask = torch.ones(rows.longest, prompt + rows.longest, dtype=torch.bool, device=q.device).tril(prompt)
    q, k, v = rows.split(q), joined(*keys), joined(*values)
    return rows.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))


class _Merged(torch.autograd.Function):
    """softmax over (prompt, own completion) as two attention calls, merged by log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, k_p, v_p, k_c, v_c, rows, scale = args
        q_rows, k_rows, v_rows = (rows.split(t).contiguous() for t in (q, k_c, v_c))
        out_p, lse_p = attention_forward(q[None], k_p[None], v_p[None], causal=False, scale=scale)
        out_c, lse_c = attention_forward(q_rows, k_rows, v_rows, causal=True, scale=scale)
        out_p, lse_p, out_c, lse_c = out_p[0], lse_p[0], rows.join(out_c), rows.join(lse_c)
        lse = torch.logaddexp(lse_p, lse_c)
        weight_p, weight_c = (lse_p - lse).exp()[..., None], (lse_c - lse).exp()[..., None]
        out = (out_p * weight_p + out_c * weight_c).to(q.dtype)
        ctx.save_for_backward(q, k_p, v_p, q_rows, k_rows, v_rows, out, lse)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k_p, v_p, q_rows, k_rows, v_rows, out, lse = ctx.saved_tensors
        rows, scale = ctx.rows, ctx.scale
        grad = grads[0].contiguous()
        prompt = (q[None], k_p[None], v_p[None], out[None], lse[None])
        dq_p, dk_p, dv_p = attention_backward(grad[None], *prompt, causal=False, scale=scale)
        grad_rows = rows.split(grad) * rows.real[:, None, :, None]
        # a row of padding belongs to no softmax: without this its weight could overflow before it is dropped
        lse_rows = rows.split(lse).masked_fill(~rows.real[:, None], float("inf"))
        own = (q_rows, k_rows, v_rows, rows.split(out).contiguous(), lse_rows.contiguous())
        dq_c, dk_c, dv_c = attention_backward(grad_rows.contiguous(), *own, causal=True, scale=scale)
        return dq_p[0] + rows.join(dq_c), dk_p[0], dv_p[0], rows.join(dk_c), rows.join(dv_c), None, None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[B, heads, L, D]` and log-sum-exp `[B, heads, L]`, by the CPU's flash-attention kernel."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = forward(q, k, v, 0.0, causal, scale=scale)
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
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given output and log-sum-exp of the whole softmax (not of this part alone)."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
