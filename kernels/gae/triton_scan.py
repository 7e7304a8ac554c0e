# pyright: basic
# Triton's own language is not typed, and no_type_check keeps import hooks from wrapping its functions.
"""GAE as one associative scan in Triton: the maps x -> d + c x composed from right to left.

PyTorch computes c and d of every token, without waiting for the GPU; one program scans them block by block,
from the last to the first, and carries the advantage from block to block.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8
LAUNCH: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}


@no_type_check
@triton.jit
def _compose(c_right, d_right, c_left, d_left):
    # a reversed scan passes the right neighbour as the first operand
    return c_right * c_left, d_left + c_left * d_right


@no_type_check
@triton.jit
def scan_kernel(d_ptr, c_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out[t] = d[t] + c[t] * out[t + 1], with 0 after the last token; fp32, one program for all tokens."""
    lane = tl.arange(0, BLOCK)
    carry = 0.0
    blocks = tl.cdiv(count, BLOCK)
    for step in range(0, blocks):
        index = (blocks - 1 - step).to(tl.int64) * BLOCK + lane
        inside = index < count
        c = tl.load(c_ptr + index, mask=inside, other=1.0)
        d = tl.load(d_ptr + index, mask=inside, other=0.0)
        c_all, d_all = tl.associative_scan((c, d), 0, _compose, reverse=True)
        result = d_all + c_all * carry
        tl.store(out_ptr + index, result, mask=inside)
        carry = tl.sum(tl.where(lane == 0, result, 0.0), 0)


def advantages(
    rewards: Tensor,
    values: Tensor,
    sequence: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
) -> Tensor:
    """Advantages `[N]`, 0 where the mask is 0; see `gae` for the formula."""
    count = len(rewards)
    out = torch.empty(count, dtype=torch.float32, device=rewards.device)
    if not count:
        return out.to(rewards.dtype)
    d, c = coefficients(rewards.float(), values.float(), sequence, mask, gamma, lam)
    with torch.cuda.device_of(out):
        scan_kernel[(1,)](d, c, out, count, BLOCK=BLOCK, **LAUNCH)
    return torch.where(mask, out, 0.0).to(rewards.dtype)


def coefficients(
    rewards: Tensor, values: Tensor, sequence: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """d and c of every token; a masked token passes on the advantage to its right within its sequence."""
    count = len(rewards)
    position = torch.arange(count, device=rewards.device)
    # position of the first unmasked token at or after each position
    at_or_after = torch.where(mask, position, count).flip(0).cummin(0).values.flip(0)
    following = torch.cat([at_or_after[1:], at_or_after.new_full((1,), count)])
    there = following.clamp(max=count - 1)
    has_next = (following < count) & (sequence[there] == sequence)
    next_value = torch.where(has_next, values[there], 0.0)
    d = torch.where(mask, rewards + gamma * next_value - values, 0.0)
    decay = lam.to(d.dtype) if isinstance(lam, Tensor) else torch.full_like(d, lam)
    return d, torch.where(mask, gamma * decay, 1.0) * has_next
