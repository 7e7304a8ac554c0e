"""Memory of the models that built-in reward functions and judges load, each worker its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlhf.compute_dtype import resolve_dtype
from rlhf.models.sizes import model_sizes
from rlhf.preflight.plan import Item
from rlhf.rewards.scoring import Rewards

HAS_HEAD = {"reward_model": False, "pair_rewards": False, "pair_model": True}
"""The built-in functions that load a model, and whether with its language-model head."""


def served_models(rewards: Rewards, *, on_cpu: bool) -> Iterator[Item]:
    """The weights in the memory that a rank computes in: workers without `gpu` are not in that of a GPU.

    Raises ModelError when the config of a model cannot be read.
    """
    for pool in rewards.all_pools:
        spec = pool.spec
        if spec.path not in HAS_HEAD or not (on_cpu or spec.gpu):
            continue
        params: Any = spec.params
        on = torch.device("cuda" if spec.gpu and not on_cpu else "cpu")
        dtype: torch.dtype = getattr(torch, resolve_dtype(params.get("dtype", "float32"), on))
        sizes = model_sizes(params["model"], dtype, head=HAS_HEAD[spec.path])
        count = pool.num_workers
        times = f" x {count} workers" if count > 1 else ""
        yield Item(
            f"{spec.kind} {pool.name}: {params['model']}{times}",
            count * sizes.weights * dtype.itemsize,
            "always",
            "workers of this function, or params.dtype=bfloat16",
        )
