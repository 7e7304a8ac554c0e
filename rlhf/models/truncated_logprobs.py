"""Log-probs among the tokens that truncated sampling left, in place of those of the whole vocabulary.

The engine drew y from the tokens S that top-k, top-p and min-p left, with log-prob log mu(y | S). The ratio
to it, to the policy before the update and to the reference is that of log-probs over the same S, recorded
when y was drawn: exact after any number of updates, whatever the policy of now would keep. Tokens outside of
S get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.kernels.candidate_logprob import candidate_logprob
from rlhf.kernels.token_stats import TokenStats
from rlhf.types import Candidates

Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, head and its bias."""


def among_candidates(
    candidates: Candidates | None,
    want: tuple[str, ...],
    sides: Mapping[str, Side],
    scaling: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Those of the wanted statistics that are log-probs, `[N]`; 0 for a token that was drawn from all."""
    found: dict[str, Tensor] = {}
    for name, (hidden, weight, bias) in sides.items():
        if candidates is not None and name in want:
            with torch.set_grad_enabled(torch.is_grad_enabled() and name == "logprob"):
                found[name] = candidate_logprob(
                    hidden, weight, candidates.ids, candidates.sizes, bias=bias, **scaling
                )
    return found


def still_wanted(
    want: tuple[str, ...], found: Mapping[str, Tensor], candidates: Candidates | None
) -> tuple[str, ...]:
    """What has to be computed of the whole vocabulary: log-probs too, if any token was drawn from all."""
    return tuple(name for name in want if name not in found) if candidates and candidates.everywhere else want


def merged(statistics: TokenStats, found: Mapping[str, Tensor], candidates: Candidates | None) -> TokenStats:
    """`found`, where tokens were drawn from a few, in statistics of the whole vocabulary."""
    known: dict[str, Tensor | None] = statistics._asdict()
    for name, among in found.items():
        of_all = known[name]
        assert candidates is not None
        known[name] = among if of_all is None else torch.where(candidates.sizes > 0, among, of_all)
    return TokenStats(**known)
