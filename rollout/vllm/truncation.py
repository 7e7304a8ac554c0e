"""What truncated sampling left, as vLLM's log-probs of the processed distribution tell it.

vLLM sets the logits of what it leaves out to minus infinity, so with more log-probs than `top_k` asked for,
those that are finite are all that was left. It keeps equal logits at the edge of top-k together, of which
bfloat16 has many: twice `top_k` and a few are asked for, and whether that is all of them is checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.rollout.engine import EngineError, SamplingParams
from rlhf.rollout.requests import Row

MARGIN = 16
IMPOSSIBLE = -9000.0
"""A log-prob below it stands for minus infinity: over HTTP that is -9999."""


def logprobs_asked(params: SamplingParams, vocabulary: int) -> int:
    """How many of the most probable tokens come with each: enough to hold all that truncation leaves."""
    return min(2 * params.top_k + MARGIN, vocabulary) if params.candidates_needed else 0


def candidates_of(
    row: Row, token: int, candidates: Sequence[tuple[int, float]], vocabulary: int
) -> Tensor | None:
    """The tokens among `candidates` (id, log-prob) that can be drawn, `token` first; None if nobody asks.

    They are all of them if one that was left out is there too, or if their probabilities sum up to 1. Raises
    EngineError: there are more, of equal probability at the edge of top-k.
    """
    if not row.request.params.candidates_needed:
        return None
    left = {other: logprob for other, logprob in candidates if logprob > IMPOSSIBLE}
    asked = logprobs_asked(row.request.params, vocabulary)
    if len(left) >= asked and abs(1.0 - sum(map(math.exp, left.values()))) > 1e-3:
        raise EngineError(
            f"vllm drew a token of {row.request.prompt.id!r} from more than {len(left)} tokens, with top_k = "
            f"{row.request.params.top_k}: too many are equally probable at its edge to say which; use "
            "another top_k, or rollout.engine=native"
        )
    return torch.tensor([token, *(other for other in left if other != token)], dtype=torch.int32)
