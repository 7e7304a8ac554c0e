"""`Contrasts`, which sequences a preference loss compares, and `Rival`. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Contrasts:
    """Signed sums of the scores of sequences of one group: M contrasts with E entries between them.

    Two groups, sequences `a b` and `c d e`: a over b, and c over e with the soft label 0.73:

        sequence    = 0 1 2 4
        coefficient = 1 -1 1 -1
        contrast    = 0 0 1 1
        target      = 1.0 0.73
        weight      = 1 1
        share       = 1 1
        offset      = 0 0

    A comparison may be several contrasts, whose shares add up to 1. Tensors are on the CPU until a
    microbatch needs them.
    """

    sequence: Tensor  # int64 [E]
    coefficient: Tensor  # fp32 [E]
    contrast: Tensor  # int64 [E]
    target: Tensor  # fp32 [M]: P(what has + is better)
    weight: Tensor  # fp32 [M]: factor of its loss
    share: Tensor  # fp32 [M]: share of a comparison
    offset: Tensor  # fp32 [M]: a constant that is subtracted from the margin (KTO's and BCO's baseline)

    def within(self, sequences: Tensor) -> Contrasts:
        """The contrasts of a microbatch, which has `sequences` (numbers, int64 `[s]`, on the CPU) in this
        order; they are numbered anew. A contrast must have all or none of its entries among them.
        """
        size = int(torch.cat([self.sequence, sequences]).max()) + 1 if len(self.sequence) else 0
        place = torch.full((size,), -1)
        place[sequences] = torch.arange(len(sequences))
        here = place[self.sequence] >= 0  # [E]
        kept = torch.zeros(len(self.target), dtype=torch.bool).index_fill(0, self.contrast[here], True)
        assert torch.equal(kept[self.contrast], here), "a microbatch cuts a contrast"
        return Contrasts(
            sequence=place[self.sequence[here]],
            coefficient=self.coefficient[here],
            contrast=(kept.cumsum(0) - 1)[self.contrast[here]],
            target=self.target[kept],
            weight=self.weight[kept],
            share=self.share[kept],
            offset=self.offset[kept],
        )

    def to(self, device: torch.device) -> Contrasts:
        return Contrasts(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Rival:
    """The other of two copies of the policy that learn the same contrasts."""

    margin: Tensor  # [M], without gradient
    is_slow: bool
    """Whether the other one is the slow copy, so that the policy of these inputs is the fast one."""
