"""Attention over one part of the keys, with its log-sum-exp, and the merge of two parts into the whole.

A query attends to the prompt and to the tokens sampled after it separately; with
`lse = logsumexp(scores)` of each part,

    out = (e^lse1 out1 + e^lse2 out2) / (e^lse1 + e^lse2) = out2 + sigmoid(lse1 - lse2) (out1 - out2)

is the attention over both parts (the merge used in FlashAttention and in cascade inference). The keys of
a prompt are therefore read once for all completions that share it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Heads = Float[Tensor, "B Hq T D"]
LogSumExp = Float[Tensor, "B Hq T"]


def attend(
    query: Heads,
    key: Float[Tensor, "B Hk L D"],
    value: Float[Tensor, "B Hk L D"],
    *,
    scale: float,
    bias: Float[Tensor, "B 1 1 L"] | None = None,
) -> tuple[Heads, LogSumExp]:
    """softmax(scale q k^T + bias) v, and the log-sum-exp (nats) of its scores.

    Runs torch's flash attention kernel on a CPU and plain matrix products (`attend_reference`) elsewhere.
    """
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse
    return attend_reference(query, key, value, scale=scale, bias=bias)


def attend_reference(
    query: Heads,
    key: Float[Tensor, "B Hk L D"],
    value: Float[Tensor, "B Hk L D"],
    *,
    scale: float,
    bias: Float[Tensor, "B 1 1 L"] | None = None,
) -> tuple[Heads, LogSumExp]:
    """The definition of `attend`, in float32 matrix products."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(repeats, 1) for x in (key, value))
    scores = query.float() @ key.mT * scale
    if bias is not None:
        scores = scores + bias.float()
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value).to(query.dtype), lse


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> Tensor:
    """Attention over the union of two disjoint sets of keys, from the output and log-sum-exp of each."""
    return torch.lerp(out2, out1, torch.sigmoid(lse1 - lse2)[..., None].to(out1.dtype))
