"""Log-prob of each sampled token among its candidates, the tokens that truncated sampling left.

With a_k = softcap * tanh(scale * (h . W_k + b_k) / softcap) / temperature, S the candidates of a token and
y in S the sampled one,

    log p(y | S) = a_y - log sum_{k in S} exp(a_k)

This equals log p(y) - log p(S) over the whole vocabulary, but needs no sum over the vocabulary: only the
candidates' rows of the LM head are read, M dot products instead of N * V, where M is the number of
candidates of all N tokens together. Forward and backward are deterministic, on a GPU too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORKSPACE_BYTES = 64 << 20
"""Memory for the gathered rows of hidden states and of the head."""

_torch: Any = torch


def candidate_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    sizes: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Log-probs `[N]`, in nats: each token's first candidate (the sampled token) among all its candidates.

    A token without candidates gets 0. Shapes: hidden `[N, H]`, weight `[V, H]`, bias `[V]`; ids `[M]` are
    the candidates of all tokens end to end, and sizes `[N]`, with sum M, how many each token has. Computed
    and returned in fp32 (float64 for float64 inputs), with gradients to hidden, weight and bias.

    Raises ValueError if the shapes do not fit each other.
    """
    if sizes.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1] or ids.ndim != 1:
        raise ValueError(
            f"expected hidden [N, H], weight [V, H], ids [M] and sizes [N], got {list(hidden.shape)}, "
            f"{list(weight.shape)}, {list(ids.shape)} and {list(sizes.shape)}"
        )
    with torch.autocast(hidden.device.type, enabled=False):
        operator: Any = _Scores
        scores = operator.apply(hidden, weight, bias, ids.long(), sizes, workspace_bytes)
        scores = scores * logit_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return _first_of_each(scores / temperature, sizes)


def candidate_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    sizes: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The definition of `candidate_logprob`: log-softmax over all logits, -inf for all but the candidates."""
    logits = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found: list[Tensor] = []
    segments = _torch.split(ids.long(), _torch.Tensor.tolist(sizes))
    for row, candidates in zip(logits / temperature, segments, strict=True):
        excluded = torch.ones_like(row, dtype=torch.bool)
        excluded[candidates] = False
        logprobs = row.masked_fill(excluded, float("-inf")).log_softmax(-1)
        found.append(logprobs[candidates[0]] if len(candidates) else row.sum() * 0.0)
    return torch.stack(found)


def _first_of_each(scores: Tensor, sizes: Tensor) -> Tensor:
    """The first entry of the log-softmax of each segment of `scores` `[M]`, as `[N]`; 0 for an empty segment.

    Computed as -softplus(logsumexp of the others - the first), which is exact for a nearly certain token too.
    """
    count = len(scores)
    owner = _owner(sizes, count)
    # tokens without candidates point to one extra, padded place at the end
    first = torch.where(sizes > 0, sizes.cumsum(0) - sizes, count)
    drawn = F.pad(scores, (0, 1))[first]
    is_first = torch.zeros(count + 1, dtype=torch.bool, device=scores.device)
    is_first[first] = True
    others = scores.masked_fill(is_first[:count], float("-inf"))
    top = scores.new_full(sizes.shape, float("-inf")).scatter_reduce(0, owner, others.detach(), "amax")
    alone = sizes < 2
    top = top.masked_fill(alone, 0.0)
    total = torch.segment_reduce((others - top[owner]).exp(), "sum", lengths=sizes, initial=0.0)
    margin = top + total.masked_fill(alone, 1.0).log() - drawn
    return -F.softplus(margin, threshold=50.0).masked_fill(alone, 0.0)


def _owner(sizes: Tensor, count: int) -> Tensor:
    """The index of the token that each candidate belongs to, `[M]`."""
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=count)


class _Scores(torch.autograd.Function):
    """h . W_k + b_k for every candidate, `[M]`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        sizes: Tensor,
        workspace_bytes: int,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        owner = _owner(sizes, len(ids))
        # a candidate needs two gathered rows in the inputs' dtype and two in full precision
        step = max(1, workspace_bytes // (4 * 4 * hidden.shape[1]))
        pieces = zip(torch.split(owner, step), torch.split(ids, step), strict=True)
        parts: list[Tensor] = [
            _torch.linalg.vecdot(hidden[o].to(precise), weight[i].to(precise)) for o, i in pieces
        ]
        ctx.save_for_backward(hidden, weight, bias, ids, sizes)
        scores = torch.cat([hidden.new_empty(0, dtype=precise), *parts])
        return scores if bias is None else scores + bias[ids].to(precise)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, ids, sizes = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # the gradient of each row of the head is summed once, in full precision, over all its occurrences
        found: tuple[Tensor, Tensor] = _torch.unique(ids, return_inverse=True)
        rows, place = found
        grad_hidden = grad_weight = grad_bias = None
        if needs_hidden:
            offsets = sizes.cumsum(0) - sizes
            table = weight[rows].to(grad.dtype)
            grad_hidden = F.embedding_bag(place, table, offsets, mode="sum", per_sample_weights=grad)
            grad_hidden = grad_hidden.to(hidden.dtype)
        order = place.argsort(stable=True)
        counts = torch.bincount(place, minlength=len(rows))
        offsets = counts.cumsum(0) - counts
        if needs_weight:
            owner = _owner(sizes, len(ids))[order]
            summed = F.embedding_bag(
                owner, hidden.to(grad.dtype), offsets, mode="sum", per_sample_weights=grad[order]
            )
            grad_weight = torch.zeros_like(weight).index_copy_(0, rows, summed.to(weight.dtype))
        if needs_bias and bias is not None:
            grad_bias = torch.zeros_like(bias)
            # segment_reduce does not accept empty input
            if len(rows):
                summed = torch.segment_reduce(grad[order], "sum", lengths=counts)
                grad_bias.index_copy_(0, rows, summed.to(bias.dtype))
        return grad_hidden, grad_weight, grad_bias, None, None, None
