"""Reads the candidates of each token (what truncated sampling left) from vLLM's log-probs.

vLLM sets the logits of the tokens it leaves out to minus infinity. So if more than `top_k` log-probs are
requested, the finite ones are those of the candidates. vLLM keeps equal logits at the edge of top-k together,
and in bfloat16 many are equal: 2 `top_k` + `MARGIN` log-probs are requested, and it is checked that these
suffice.
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
"""A log-prob below this stands for minus infinity, which is -9999 over HTTP."""


def logprobs_asked(params: SamplingParams, vocabulary: int) -> int:
    """The number of log-probs to request per token, so that all candidates are among them."""
    return min(2 * params.top_k + MARGIN, vocabulary) if params.candidates_needed else 0


def candidates_of(
    row: Row, token: int, candidates: Sequence[tuple[int, float]], vocabulary: int
) -> Tensor | None:
    """The ids among `candidates` (id, log-prob) that can be drawn, `token` first; None if not needed.

    They are complete if a token that was left out is there too, or if their probabilities sum to 1. Otherwise
    more tokens are equally probable at the edge of top-k, which raises EngineError.
    """
    if not row.request.params.candidates_needed:
        return None
    drawable = {other: logprob for other, logprob in candidates if logprob > IMPOSSIBLE}
    asked = logprobs_asked(row.request.params, vocabulary)
    if len(drawable) >= asked and abs(1.0 - sum(map(math.exp, drawable.values()))) > 1e-3:
        raise EngineError(
            f"vllm drew a token of {row.request.prompt.id!r} from more than {len(drawable)} tokens with "
            f"top_k = {row.request.params.top_k}: too many are equally probable at its edge; use another "
            "top_k, or rollout.engine=native"
        )
    return torch.tensor([token, *(other for other in drawable if other != token)], dtype=torch.int32)
