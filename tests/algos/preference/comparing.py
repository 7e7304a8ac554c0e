"""Microbatches of one-token and many-token completions for tests of preference losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.algos.preference.forms import Row, stack
from rlhf.algos.preference.losses import ComparedGroup
from rlhf.algos.preference.pairing import Comparison
from rlhf.types import Counts, LossInputs, Source


def group_of(
    comparisons: Sequence[Comparison], lengths: Sequence[int] = (), sources: Sequence[Source] = ()
) -> ComparedGroup:
    """A group with these comparisons; its completions are the dataset's where no `sources` are given."""
    last = max((i for c in comparisons for i in (c.better, c.other) if i is not None), default=-1)
    count = max(len(lengths), len(sources), last + 1)
    return ComparedGroup(comparisons, lengths or [1] * count, sources or [Source.DATA] * count)


def comparing(
    logprobs: Tensor | Sequence[float],
    rows: Sequence[Row],
    *,
    reference: Sequence[float] | None = None,
    iterate: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    pull: Sequence[float] | None = None,
    offset: Sequence[float] | None = None,
) -> LossInputs:
    """Completions with these summed log-probs, each spread evenly over its tokens (one, or `lengths`).

    Without `reference` the reference is 0: log-probs are then the log-ratios D. So is the iterate.
    """
    sums = torch.as_tensor(logprobs, dtype=torch.float64)
    tokens = torch.tensor(lengths or [1] * len(sums))
    sequence = torch.arange(len(sums)).repeat_interleave(tokens)
    n = len(sequence)

    def spread(x: Tensor) -> Tensor:
        return (x / tokens)[sequence]

    given = spread(sums)
    ref = torch.zeros(len(sums)) if reference is None else torch.tensor(reference)
    before = torch.zeros(len(sums)) if iterate is None else torch.tensor(iterate)
    contrasts = stack(rows)
    if offset is not None:
        contrasts = replace(contrasts, offset=torch.tensor(offset))
    return LossInputs(
        logprobs=given,
        entropy=torch.zeros(n, dtype=torch.float64),
        exact_kl=None,
        old_logprobs=given.detach(),
        rollout_logprobs=torch.zeros(n, dtype=torch.float64),
        ref_logprobs=spread(ref.double()),
        advantages=torch.zeros(n, dtype=torch.float64),
        loss_mask=torch.ones(n, dtype=torch.bool),
        sequence=sequence,
        turn=torch.zeros(n, dtype=torch.int64),
        counts=Counts(tokens=n, sequences=len(sums), comparisons=float(contrasts.share.sum())),
        kl_coef=0.0,
        recorded=torch.zeros(n, dtype=torch.bool),
        contrasts=contrasts,
        iterate_logprobs=spread(before.double()),
        pull=None if pull is None else torch.tensor(pull, dtype=torch.float64),
    )
