"""The running state of a row (online softmax), the merge of two states, and the statistics of a finished one.

A row (one token) is read in parts: column tiles, and shards of a vocabulary spread over ranks. Each part
is folded into a state of ten numbers. The sums leave the target's own column out; `finish` adds it in
closed form. That keeps the log-probability of a nearly certain token exact: it is
-softplus(log(sum of the others) + max - target), not target - logsumexp, which would cancel.

With a = scaled logits of the policy, u = those of the reference, m and n their running maxima (MAX,
REF_MAX), d = a - m and e = u - n:

    OTHERS      sum exp(d)              REF_OTHERS   sum exp(e)
    SHIFTED     sum exp(d) d
    GAP         sum exp(d) (d - e)      REF_GAP      sum exp(e) (e - d)

TARGET and REF_TARGET are the target's scaled logits; OWNED is 1 once the target's column was read. Gaps
are taken between shifted logits, so a constant added to either model's logits costs no precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Target of a masked token: its statistics and gradients are 0."""

FLOOR = -1e30
"""Stands for a logit of minus infinity: exp() of it is 0, and 0 times it is 0, not NaN."""

IMPOSSIBLE = -1e20
"""A scaled logit below this stands for minus infinity; no sensible temperature brings FLOOR above it."""

MAX, OTHERS, SHIFTED, GAP, REF_MAX, REF_OTHERS, REF_GAP, TARGET, REF_TARGET, OWNED = range(10)
STATE_ROWS = 10

# rows of the tensor that is saved for backward
S_MAX, S_LOG_SUM, S_REF_MAX, S_REF_LOG_SUM, S_LOGPROB, S_ENTROPY, S_KL = range(7)
SAVED_ROWS = 7


class TokenStats(NamedTuple):
    """Per token, `[N]`, in nats; fp32 (float64 for float64 inputs); None where not wanted.

    `kl` is KL(policy || reference), `kl_reverse` KL(reference || policy), both over the whole vocabulary.
    All are 0 for a token whose target is `IGNORED`.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    kl: Tensor | None = None
    kl_reverse: Tensor | None = None
    ref_logprob: Tensor | None = None


FIELDS = TokenStats._fields
NEEDS_REFERENCE = frozenset({"kl", "kl_reverse", "ref_logprob"})


def empty_state(rows: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state `[STATE_ROWS, rows]` before any column was read."""
    state = torch.zeros(STATE_ROWS, rows, dtype=dtype, device=device)
    state[MAX] = FLOOR
    state[REF_MAX] = FLOOR
    return state


def merge(first: Tensor, second: Tensor) -> Tensor:
    """The state over all columns, from the states of two disjoint sets of columns of the same rows."""
    merged = torch.empty_like(first)
    top = torch.maximum(first[MAX], second[MAX])
    ref_top = torch.maximum(first[REF_MAX], second[REF_MAX])
    merged[OTHERS:REF_MAX] = 0
    merged[REF_OTHERS:TARGET] = 0
    for part in (first, second):
        down, ref_down = part[MAX] - top, part[REF_MAX] - ref_top
        share, ref_share = down.exp(), ref_down.exp()
        merged[OTHERS] += share * part[OTHERS]
        merged[SHIFTED] += share * (part[SHIFTED] + down * part[OTHERS])
        merged[GAP] += share * (part[GAP] + (down - ref_down) * part[OTHERS])
        merged[REF_OTHERS] += ref_share * part[REF_OTHERS]
        merged[REF_GAP] += ref_share * (part[REF_GAP] + (ref_down - down) * part[REF_OTHERS])
    merged[MAX], merged[REF_MAX] = top, ref_top
    merged[TARGET:] = first[TARGET:] + second[TARGET:]
    return merged


def finish(state: Tensor, want: frozenset[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The wanted statistics by name, and what backward needs `[SAVED_ROWS, rows]`, once all columns are read.

    A row whose target is outside the vocabulary has a log-probability of NaN.
    """
    owned = state[OWNED] > 0
    side = _close(state[MAX], state[OTHERS], state[TARGET], owned)
    saved = torch.zeros(SAVED_ROWS, state.shape[1], dtype=state.dtype, device=state.device)
    stats = {"logprob": side.logprob, "logsumexp": side.top + side.log_sum}
    saved[S_MAX], saved[S_LOG_SUM], saved[S_LOGPROB] = side.top, side.log_sum, side.logprob
    if "entropy" in want:
        shifted = state[SHIFTED] + side.weight * side.lead
        stats["entropy"] = side.log_sum - shifted / side.total
        saved[S_ENTROPY] = stats["entropy"]
    if NEEDS_REFERENCE & want:
        ref = _close(state[REF_MAX], state[REF_OTHERS], state[REF_TARGET], owned)
        saved[S_REF_MAX], saved[S_REF_LOG_SUM] = ref.top, ref.log_sum
        between = side.log_sum - ref.log_sum
        gap = side.lead - ref.lead
        stats["ref_logprob"] = ref.logprob
        kl = (state[GAP] + side.weight * gap) / side.total - between
        kl_reverse = (state[REF_GAP] - ref.weight * gap) / ref.total + between
        saved[S_KL] = kl
        # infinite where one model gives probability 0 to a token that the other may choose
        stats["kl"] = torch.where(kl > -IMPOSSIBLE, torch.inf, kl)
        stats["kl_reverse"] = torch.where(kl_reverse > -IMPOSSIBLE, torch.inf, kl_reverse)
    return {name: value for name, value in stats.items() if name in want}, saved


class _Side(NamedTuple):
    """One model's finished rows, relative to their maximum `top`."""

    top: Tensor
    lead: Tensor  # target minus top, 0 without a target in the vocabulary
    weight: Tensor  # exp(lead), 0 without a target in the vocabulary
    total: Tensor  # sum of exp(a - top), target included
    log_sum: Tensor
    logprob: Tensor


def _close(top: Tensor, others: Tensor, target: Tensor, owned: Tensor) -> _Side:
    lead = torch.where(owned, target - top, 0.0)
    weight = torch.where(owned, lead.exp(), 0.0)
    # a row whose logits are all minus infinity is no distribution
    total = torch.where(top <= IMPOSSIBLE, torch.nan, others + weight)
    # where the target is the maximum, total is 1 + others and log1p keeps a small `others` exact
    log_sum = torch.where(owned & (lead == 0), others.log1p(), total.log())
    margin = others.log() - lead
    softplus = margin.clamp(min=0) + margin.abs().neg().exp().log1p()
    logprob = torch.where(target <= IMPOSSIBLE, -torch.inf, -softplus)
    return _Side(top, lead, weight, total, log_sum, torch.where(owned, logprob, torch.nan))
