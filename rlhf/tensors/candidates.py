"""`Candidates`: the tokens that truncated sampling (top-k, top-p, min-p) left to draw from.

Engine and learner normalise their log-probs over the same candidates. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def leaves_out(top_p: float, top_k: int, min_p: float) -> bool:
    """Whether sampling with these settings truncates, so that some tokens cannot be drawn."""
    return top_p < 1 or top_k > 0 or min_p > 0


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The tokens that truncated sampling (top-k, top-p, min-p) left to draw each of N tokens from.

    The candidates of all tokens stand end to end, the drawn one first: `Candidates((7, 3, 5, 9), (3, 1))`
    says that 7 was drawn from 7, 3 and 5, and that 9 was the only candidate. Size 0: nothing was truncated.
    """

    ids: Tensor
    """int32 `[M]`, with M the sum of the sizes."""
    sizes: Tensor
    """int64 `[N]`: the number of candidates of each token."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Candidates):
            return NotImplemented
        return torch.equal(self.ids, other.ids) and torch.equal(self.sizes, other.sizes)

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int] | Tensor]) -> Candidates:
        """From the candidates of each token, one sequence of ids a token."""
        none = torch.empty(0, dtype=torch.int32)
        ids = torch.cat([none, *(torch.as_tensor(ids, dtype=torch.int32) for ids in tokens)])
        return cls(ids, torch.tensor([len(ids) for ids in tokens], dtype=torch.long))

    def each(self) -> list[Tensor]:
        """The candidates of each token: the inverse of `of`."""
        sizes: Any = self.sizes
        return list(torch.split(self.ids, sizes.tolist()))

    @classmethod
    def join(cls, several: Sequence[Candidates]) -> Candidates:
        """All of them end to end."""
        ids = torch.cat([torch.empty(0, dtype=torch.int32), *(c.ids for c in several)])
        return cls(ids, torch.cat([torch.empty(0, dtype=torch.long), *(c.sizes for c in several)]))

    def take(self, index: Tensor) -> Candidates:
        """The candidates of the tokens at `index`, in that order."""
        sizes = self.sizes[index]
        # added to the place in the result, this gives the place in `ids`
        starts = (self.sizes.cumsum(0) - self.sizes)[index] - (sizes.cumsum(0) - sizes)
        total = int(sizes.sum())
        places = torch.arange(total, device=sizes.device) + starts.repeat_interleave(sizes, output_size=total)
        return Candidates(self.ids[places], sizes)

    def only(self, mask: Tensor) -> Candidates:
        """The same tokens, those outside `mask` (bool `[N]`) without candidates."""
        return Candidates(self.ids[mask.repeat_interleave(self.sizes)], self.sizes * mask)

    def to(self, device: torch.device) -> Candidates:
        return Candidates(self.ids.to(device), self.sizes.to(device))
