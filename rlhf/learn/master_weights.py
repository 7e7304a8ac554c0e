"""A weight as the optimizer has it: its float32 master, its gradient, AdamW's moments.

The model computes with the master rounded to bfloat16, which is nearly the upper half of its bits. So the
lower half is kept beside the weight, and the two are the master, in 4 bytes in place of 6:

    bits(master) = bits(weight) * 2^16 + lower,   lower from -2^15 to 2^15 - 1

(as Split-SGD-BF16, arXiv:2005.04680, which cuts where this rounds). A master exactly halfway between two
bfloat16 numbers, one in 65,536, has its last bit taken off, since its `lower` would be one of two. The
master exists as a whole for a piece of the weight at a time, while that is updated.
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
"""Elements that are updated at a time: in the cache of a core, and enough to keep a GPU busy."""


@dataclass(slots=True, eq=False)
class Moments:
    """Of AdamW, of the master's shape, and the number of updates they are the mean of."""

    first: Tensor
    second: Tensor
    step: Tensor


class Master:
    """Of `weight`, which is float32 and becomes `dtype`; of a sharded one, this rank's rows as they are.

    A weight that is of the `dtype` already is its own master.
    """

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        self.weight = weight
        self.is_sharded = is_sharded(weight)
        if not self.is_sharded:
            weight.data = weight.data.contiguous()
        self.gradient: Tensor | None = None
        """After `collect`, and of a weight in 16 bits already while backward passes add to it."""
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
        """Of what this rank holds."""
        return own_rows(self.weight).shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the master."""
        return self.weight.dtype if self._lower is None else torch.float32

    def value(self) -> Tensor:
        """The master: a tensor of its own where it is in halves."""
        if self._lower is None:
            return own_rows(self.weight).detach()
        return joined(self.weight.detach(), self._lower)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Makes it the master, and the weight its rounded one."""
        if self._lower is None:
            self.value().copy_(value)
            return
        for whole, weight, lower in self._pieces(value.contiguous(), self.weight.detach(), self._lower):
            split(whole, weight, lower)

    def collect(self) -> None:
        """What backward passes have left becomes the gradient; zeros where they left nothing."""
        if self._lower is None:
            gradient, self.weight.grad = self.weight.grad, None
            self.gradient = None if gradient is None else own_rows(gradient)
        if self.gradient is None:
            self.gradient = torch.zeros_like(own_rows(self.weight))

    def widened(self) -> Tensor:
        """The gradient, which is in float32 from here on."""
        assert self.gradient is not None
        if self._lower is not None:
            self.gradient = self.gradient.float()
        return self.gradient

    def norm(self) -> Tensor:
        """Of the gradient, in float32 at least."""
        assert self.gradient is not None
        return norm(self.gradient)

    @torch.no_grad()
    def update(self, factor: Tensor, lr: float, section: LearnerConfig) -> None:
        """AdamW with the gradient times `factor`."""
        assert self.gradient is not None
        first, second = self.moments.first, self.moments.second
        held = (self.value(),) if self._lower is None else (self.weight.detach(), self._lower)
        for gradient, mean, square, *parts in self._pieces(self.gradient.contiguous(), first, second, *held):
            whole = parts[0] if self._lower is None else joined(*parts)
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
                split(whole, *parts)
        self.moments.step += 1

    def saved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What a checkpoint needs of it: the master and its moments, in shards where the weight is."""
        value = self.weight.detach() if self.is_sharded else self.value()
        if self._lower is not None:
            # joined on a GPU, but not all of them there at once
            value = value.cpu()
        first, second = (
            as_shard(m, self.weight) if self.is_sharded else m
            for m in (self.moments.first, self.moments.second)
        )
        return value, {"step": self.moments.step, "exp_avg": first, "exp_avg_sq": second}

    def _take_gradient(self, weight: Tensor) -> None:
        """The first one stays in the weight's own type, in which it loses nothing; more make it float32."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient = self.gradient.float().add_(gradient)

    def _pieces(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """The same part of each, one after the other."""
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
    # the conversion keeps the last 16 bits
    lower.copy_(bits)
