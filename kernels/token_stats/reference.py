"""The reference backend of `token_stats`, in plain PyTorch: all logits at once, derivatives by autograd.

The other backends are tested against it in float64. It stores several tensors of the logits' size, so it is
meant for tests and small models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.kernels.token_stats.inputs import check_targets, gathered, spread, unmasked_index
from rlhf.kernels.token_stats.ops import Arguments
from rlhf.kernels.token_stats.state import FIELDS, NEEDS_REFERENCE, TokenStats


def statistics(arguments: Arguments) -> TokenStats:
    """The wanted statistics of all tokens; those of masked tokens are 0 and have no gradient."""
    index = unmasked_index(arguments.targets, arguments.num_unmasked)

    def rows(tensor: Tensor) -> Tensor:
        return gathered(tensor, index)

    vector = arguments.temperature
    temperature = arguments.scalar_temperature if vector is None else rows(vector)

    def scaled(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return scaled_logits(
            project(rows(hidden), weight),
            bias=bias,
            temperature=temperature,
            softcap=arguments.softcap,
            logit_scale=arguments.logit_scale,
        )

    ref_logits = None
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        logits = scaled(arguments.hidden, arguments.weight, arguments.bias)
        if NEEDS_REFERENCE & arguments.wanted and arguments.ref_hidden is not None:
            shared = arguments.ref_weight is None
            ref_weight = arguments.weight if arguments.ref_weight is None else arguments.ref_weight
            ref_bias = arguments.bias if shared else arguments.ref_bias
            ref_logits = scaled(arguments.ref_hidden, ref_weight, ref_bias)
        targets = rows(arguments.targets)
        check_targets(targets, logits.shape[1], arguments.group)
        stats = statistics_of(logits, targets, ref_logits, arguments.wanted)
    count = len(arguments.targets)
    return TokenStats(*(spread(stats[name], index, count) if name in stats else None for name in FIELDS))


def statistics_of(
    logits: Tensor, targets: Tensor, ref_logits: Tensor | None, want: frozenset[str]
) -> dict[str, Tensor]:
    """The wanted statistics, by name, of scaled logits `[N, V]`; `ref_logits` get no gradient.

    A target outside the vocabulary gives a log-probability of NaN.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    inside = (targets >= 0) & (targets < logits.shape[-1])
    column = torch.where(inside, targets, 0)[:, None]
    stats: dict[str, Tensor] = {}
    if "logprob" in want:
        stats["logprob"] = torch.where(inside, logprobs.gather(1, column)[:, 0], torch.nan)
    if "entropy" in want:
        stats["entropy"] = -(probs * _where_possible(logprobs, probs)).sum(-1)
    if "logsumexp" in want:
        stats["logsumexp"] = logits.logsumexp(-1)
    if NEEDS_REFERENCE & want:
        assert ref_logits is not None
        ref_logprobs = torch.log_softmax(ref_logits.detach(), dim=-1)
        ref_probs = ref_logprobs.exp()
        stats["ref_logprob"] = torch.where(inside, ref_logprobs.gather(1, column)[:, 0], torch.nan)
        gap = logprobs - ref_logprobs
        stats["kl"] = (probs * _where_possible(gap, probs)).sum(-1)
        stats["kl_reverse"] = -(ref_probs * _where_possible(gap, ref_probs)).sum(-1)
    return {name: value for name, value in stats.items() if name in want}


def scaled_logits(
    logits: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """softcap * tanh(logit_scale * (logits + bias) / softcap) / temperature, in fp32 or float64."""
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    logits = logits.to(wide)
    if bias is not None:
        logits = logits + bias.to(wide)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    divisor = temperature[:, None].to(wide) if isinstance(temperature, Tensor) else temperature
    return logits / divisor


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits hidden @ weight.T in fp32, or in float64 for float64 inputs."""
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    return hidden.to(wide) @ weight.to(wide).T


def _where_possible(values: Tensor, probs: Tensor) -> Tensor:
    # 0 * log 0 is 0, and so is its derivative
    return values.masked_fill(probs == 0, 0.0)
