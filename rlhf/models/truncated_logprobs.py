"""Log-probs renormalised over the candidates of truncated sampling instead of the whole vocabulary.

The engine drew y from the candidates S that top-k, top-p and min-p left, with log-prob log mu(y | S). Policy,
old policy and reference are scored over the same S, recorded when y was drawn. So their ratios are exact
after any number of updates, whichever tokens the current policy would keep. Tokens outside of S get no
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.kernels.candidate_logprob import candidate_logprob
from rlhf.kernels.token_stats import TokenStats
from rlhf.tensors.candidates import Candidates

HeadInputs = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states `[N, H]`, weight of the head `[V, H]`, and its bias `[V]`."""


def candidate_logprobs(
    candidates: Candidates | None,
    want: tuple[str, ...],
    inputs: Mapping[str, HeadInputs],
    scaling: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The wanted log-probs `[N]`, each over the candidates of its token, by name of the statistic.

    0 for a token without candidates, which was drawn from the whole vocabulary. Empty without `candidates`.
    """
    found: dict[str, Tensor] = {}
    for name, (hidden, weight, bias) in inputs.items():
        if candidates is not None and name in want:
            # no gradient into the reference
            with torch.set_grad_enabled(torch.is_grad_enabled() and name == "logprob"):
                found[name] = candidate_logprob(
                    hidden, weight, candidates.ids, candidates.sizes, bias=bias, **scaling
                )
    return found


def missing_statistics(
    want: tuple[str, ...], found: Mapping[str, Tensor], candidates: Candidates | None, num_targets: int
) -> tuple[str, ...]:
    """Names of the statistics that still need the whole vocabulary.

    Log-probs are among them if any of the `num_targets` tokens that are not ignored has no candidates.
    """
    if candidates is None or int((candidates.sizes > 0).sum()) < num_targets:
        return want
    return tuple(name for name in want if name not in found)


def with_candidates(
    statistics: TokenStats, found: Mapping[str, Tensor], candidates: Candidates | None
) -> TokenStats:
    """`statistics` of the whole vocabulary, replaced by `found` for every token that has candidates."""
    merged: dict[str, Tensor | None] = statistics._asdict()
    for name, over_candidates in found.items():
        over_all = merged[name]
        assert candidates is not None
        if over_all is None:
            merged[name] = over_candidates
        else:
            merged[name] = torch.where(candidates.sizes > 0, over_candidates, over_all)
    return TokenStats(**merged)
