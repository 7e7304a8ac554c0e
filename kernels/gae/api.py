"""`gae`, the entry point of generalised advantage estimation: checks arguments and picks a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.kernels import backend as backends
from rlhf.kernels.gae import reference


class Gae(NamedTuple):
    """Advantages and returns (advantages plus values) per token, `[N]`; 0 where the loss mask is 0."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    sequence: Tensor,
    loss_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    backend: backends.Backend = "auto",
) -> Gae:
    """Advantages and returns of packed sequences by GAE (arXiv:1506.02438), right to left in each sequence:

        delta_t = r_t + gamma V_next - V_t        A_t = delta_t + gamma lam_t A_next

    where "next" is the next token of the same sequence whose loss mask is 1; after the last one both V
    and A are 0. Tokens whose mask is 0 (such as a tool's output) are skipped and their rewards and values not
    read: inserting such tokens changes nothing.

    rewards, values: float `[N]`, in the same unit. sequence: integer `[N]`, the same number for all tokens
    of a sequence, which lie next to each other. loss_mask: bool (or 0/1) `[N]`. lam: a number or `[N]`. The
    result has no gradients.

    Raises ValueError for shapes or precisions that do not fit, or a backend that cannot run here.
    """
    vectors = {"values": values, "sequence": sequence, "loss_mask": loss_mask}
    if isinstance(lam, Tensor):
        vectors["lam"] = lam
    for name, vector in vectors.items():
        if rewards.ndim != 1 or vector.shape != rewards.shape:
            raise ValueError(
                f"expected rewards and {name} [N], got {list(rewards.shape)} and {list(vector.shape)}"
            )
    if not rewards.is_floating_point() or rewards.dtype is not values.dtype:
        raise ValueError(f"rewards are {rewards.dtype} and values {values.dtype}: give both one float type")
    chosen = backends.resolve(backend, rewards, offered=("reference", "triton"))
    with torch.no_grad():
        mask = loss_mask.bool()
        if chosen == "triton":
            from rlhf.kernels.gae.triton_scan import advantages as scan
        else:
            scan = reference.advantages
        result = scan(rewards, values, sequence, mask, gamma, lam)
        return Gae(result, torch.where(mask, result + values, 0.0))
