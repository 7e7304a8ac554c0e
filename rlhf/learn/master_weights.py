"""Float32 master weights in two 16-bit halves, with their gradients and AdamW's moments.

The model computes with the master rounded to bfloat16, which is nearly the upper half of the master's bits.
So only the lower half is stored beside the weight; together they are the master, in 4 bytes instead of 6:

    bits(master) = bits(weight) * 2^16 + lower,   lower from -2^15 to 2^15 - 1

(as Split-SGD-BF16, arXiv:2005.04680, which truncates where this rounds). A master exactly halfway between two
bfloat16 numbers, one in 65,536, has its last bit set to 0, because its `lower` would not be unique. During an
update the masters of only a piece of the weight at a time exist as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.config.learner import LearnerConfig
from rlhf.distributed.shards import as_shard, is_sharded, own_rows
from rlhf.torch_typed import adamw, after_gradient, norm, pieces

ON_CPU, ELSEWHERE = 1 << 17, 1 << 24
"""Elements that are updated at a time: what fits a CPU core's cache, and enough to keep a GPU busy."""


@dataclass(slots=True, eq=False)
class Moments:
    """AdamW's moments, of the master's shape, and the number of updates that went into them."""

    first: Tensor
    second: Tensor
    step: Tensor


class Master:
    """Master of `weight`, which is given in float32 and becomes `dtype`.

    A weight that has that `dtype` already is its own master; so is a sharded weight, of which each rank
    updates its own rows.
    """

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        self.weight = weight
        self.is_sharded = is_sharded(weight)
        if not self.is_sharded:
            weight.data = weight.data.contiguous()
        self.gradient: Tensor | None = None
        """There after `collect`; for a weight in 16 bits also before it, while backward passes add to it."""
        self._lower: Tensor | None = None
        if not self.is_sharded and weight.dtype != dtype:
            assert (weight.dtype, dtype) == (torch.float32, torch.bfloat16), "no other halves are known"
            value = weight.detach()
            weight.data = torch.empty_like(value, dtype=dtype)
            self._lower = torch.empty_like(value, dtype=torch.int16)
            self.set(value)
            after_gradient(weight, self._take_gradient)
        first, second = (torch.zeros(self.shape, dtype=self.dtype, device=weight.device) for _ in range(2))
        self.moments = Moments(first, second, torch.zeros((), device=weight.device))

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows that this rank holds."""
        return own_rows(self.weight).shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the master."""
        return self.weight.dtype if self._lower is None else torch.float32

    def value(self) -> Tensor:
        """The master: a new tensor where it is stored in halves, else the weight's own."""
        if self._lower is None:
            return own_rows(self.weight).detach()
        return joined(self.weight.detach(), self._lower)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Sets the master to `value`, and the weight to `value` rounded."""
        if self._lower is None:
            self.value().copy_(value)
            return
        for whole, weight, lower in self._pieces(value.contiguous(), self.weight.detach(), self._lower):
            split(whole, weight, lower)

    def collect(self) -> None:
        """Makes what backward passes have accumulated the gradient; zeros where there was none."""
        if self._lower is None:
            gradient, self.weight.grad = self.weight.grad, None
            self.gradient = None if gradient is None else own_rows(gradient)
        if self.gradient is None:
            self.gradient = torch.zeros_like(own_rows(self.weight))

    def widened(self) -> Tensor:
        """The gradient, converted to float32 where it was not."""
        assert self.gradient is not None
        if self._lower is not None:
            self.gradient = self.gradient.float()
        return self.gradient

    def norm(self) -> Tensor:
        """Norm of the gradient, computed in float32 at least."""
        assert self.gradient is not None
        return norm(self.gradient)

    @torch.no_grad()
    def update(self, factor: Tensor, lr: float, section: LearnerConfig) -> None:
        """One step of AdamW with the gradient times `factor`."""
        assert self.gradient is not None
        first, second = self.moments.first, self.moments.second
        held = (self.value(),) if self._lower is None else (self.weight.detach(), self._lower)
        stored = (self.gradient.contiguous(), first, second, *held)
        for gradient, mean, square, *halves in self._pieces(*stored):
            whole = halves[0] if self._lower is None else joined(*halves)
            scaled = gradient.to(whole.dtype) * factor
            adamw(
                whole,
                scaled,
                mean,
                square,
                self.moments.step,
                lr=lr,
                betas=section.betas,
                eps=section.eps,
                weight_decay=section.weight_decay,
            )
            if self._lower is not None:
                split(whole, *halves)
        self.moments.step += 1

    def saved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What a checkpoint saves: the master and its moments, in shards where the weight is sharded."""
        value = self.weight.detach() if self.is_sharded else self.value()
        if self._lower is not None:
            # the joined masters of all weights would not fit beside the model on a GPU
            value = value.cpu()
        first, second = (
            as_shard(m, self.weight) if self.is_sharded else m
            for m in (self.moments.first, self.moments.second)
        )
        return value, {"step": self.moments.step, "exp_avg": first, "exp_avg_sq": second}

    def _take_gradient(self, weight: Tensor) -> None:
        """Takes the gradient that a backward pass has left on the weight, and adds it up.

        A single gradient loses nothing in the weight's own type; a sum of several is kept in float32.
        """
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient = self.gradient.float().add_(gradient)

    def _pieces(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Pieces of the flattened tensors: the same elements of each of them at a time."""
        size = ON_CPU if self.weight.device.type == "cpu" else ELSEWHERE
        count = tensors[0].numel()
        sizes = [size] * (count // size) + [count % size] * bool(count % size)
        yield from map(list, zip(*(pieces(t.view(-1), sizes) for t in tensors), strict=True))


def joined(weight: Tensor, lower: Tensor) -> Tensor:
    """The float32 master of its two halves."""
    return weight.view(torch.int16).int().bitwise_left_shift_(16).add_(lower).view(torch.float32)


def split(master: Tensor, weight: Tensor, lower: Tensor) -> None:
    """Stores a float32 master in its two halves."""
    bits = master.view(torch.int32)
    bits = bits - bits.bitwise_and(0xFFFF).eq_(0x8000)
    weight.copy_(bits.view(torch.float32))
    # copying to int16 keeps the last 16 bits
    lower.copy_(bits)
