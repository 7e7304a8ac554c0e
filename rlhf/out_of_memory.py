"""The message of an out-of-memory error: which setting to lower, depending on the phase it happened in."""

from __future__ import annotations

import torch

# by the name of the phase, as `Monitor.phase` has it
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
"""Texts of out-of-memory errors: from torch on a CPU and on a GPU, the system, C++, and cuBLAS or cuDNN."""


def memory_advice(error: BaseException, place: str) -> str | None:
    """The message for the user; None when `error` is not about memory.

    `place`: what the run was doing, as `rlhf.loop.Loop.place` has it: "learn, step 3".
    """
    text = str(error)
    short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not short and not any(sign in text.lower() for sign in SIGNS):
        return None
    phase = place.partition(",")[0]
    first_line = (text.splitlines() or ["no more memory"])[0]
    advice = ADVICE.get(phase, "take a smaller model or more ranks")
    return f"out of memory in {place}: {advice}.\n({first_line})"
