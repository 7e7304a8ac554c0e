"""The learning-rate schedule: warm-up, then constant, linear, cosine or inverse square root."""

from __future__ import annotations

import math

from rlhf.config.learner import LearnerConfig


def lr_factor(step: int, section: LearnerConfig, total_steps: int) -> float:
    """Linear warm-up over the first `warmup_steps`, then the schedule; `step` counts from 0.

    `inverse_sqrt` is the schedule of PPO-max (arXiv:2307.04964, its code), with W for `warmup_steps`:
    max(step / W, 0.1) up to W, sqrt(W / step) from there on.
    """
    warmup = section.warmup_steps
    if section.schedule == "inverse_sqrt":
        rising, falling = max(step / max(1, warmup), 0.1), math.sqrt(max(1, warmup) / max(1, step, warmup))
        return rising if step < warmup else max(falling, 1e-8)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    match section.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
