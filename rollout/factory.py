"""Engines by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from rlhf.rollout.engine import RolloutEngine
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.native import NativeEngine


def make_engine(
    name: str, model: nn.Module, *, eos_token_ids: Sequence[int], kv_cache_gib: float = 4.0
) -> RolloutEngine:
    """An engine that holds `model` itself. If "native" cannot decode it: "hf", with a warning why."""
    if name == "native":
        try:
            return NativeEngine(model, eos_token_ids=eos_token_ids, kv_cache_gib=kv_cache_gib)
        except ValueError as error:
            warnings.warn(f"{error}; rollouts use the slower engine 'hf' instead", stacklevel=2)
            name = "hf"
    if name == "hf":
        return HFEngine(model, eos_token_ids=eos_token_ids)
    raise ValueError(f"unknown rollout engine {name!r}; there are 'native' and 'hf'")
