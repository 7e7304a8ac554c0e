"""Out of memory: which setting to lower, by what the run was doing."""

from __future__ import annotations

import torch

ADVICE = {
    "load": "set distributed.mode=sharded with more ranks, or model.dtype=bfloat16",
    "rollout": "lower rollout.kv_cache_gib (keys and values) or rollout.prompts_per_step",
    "eval": "lower rollout.kv_cache_gib (keys and values) or eval.max_prompts",
    "reward": "lower the memory of the reward function, or rollout.prompts_per_step",
    "learn": "lower learner.microbatch_tokens, or set model.gradient_checkpointing=true",
    "sync": "set distributed.mode=sharded with more ranks",
    "save": "set checkpoint.background=false",
}
SIGNS = (
    "can't allocate memory",
    "out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "status_alloc_failed",
)
"""Of torch for a CPU and for a GPU, of the system, of the C++ library, and of cuBLAS and cuDNN."""


def memory_advice(error: BaseException, place: str) -> str | None:
    """For people; None when memory was not what was short. `place`: a phase, and where the run stood."""
    text = str(error)
    short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not short and not any(sign in text.lower() for sign in SIGNS):
        return None
    phase = place.partition(",")[0]
    first = (text.splitlines() or ["no more memory"])[0]
    return f"out of memory in {place}: {ADVICE.get(phase, 'take a smaller model or more ranks')}.\n({first})"
