"""Attention that also returns its log-sum-exp, so that two parts of one context can be merged.

A query that sees a prompt and the tokens sampled after it attends to each part on its own; with
`lse = logsumexp(scores)` of a part,

    out = (e^lse1 out1 + e^lse2 out2) / (e^lse1 + e^lse2) = out2 + sigmoid(lse1 - lse2) (out1 - out2)

is the attention over both (the merge of FlashAttention and of cascade inference). Keys of a prompt are
thus read once for all the completions that share it.
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
    """softmax(scale q k^T + bias) v and the log-sum-exp (nats) of its scores.

    The one place where the implementation is chosen: torch's flash kernel on a CPU, plain matrix products
    elsewhere.
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
    """What `attend` means, in float32 matrix products."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(repeats, 1) for x in (key, value))
    scores = query.float() @ key.mT * scale
    if bias is not None:
        scores = scores + bias.float()
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value).to(query.dtype), lse


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> Tensor:
    """Attention over the union of two sets of keys."""
    return torch.lerp(out2, out1, torch.sigmoid(lse1 - lse2)[..., None].to(out1.dtype))
