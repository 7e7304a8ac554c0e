"""Rows of the native engine whose keys and values are in one cache, and which of them are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from rlhf.rollout.engine import RolloutRequest
from rlhf.rollout.native.cache import SharedPrefixCache
from rlhf.rollout.requests import Row


@dataclass(slots=True, eq=False)
class Cohort:
    """Groups that were admitted together, and what continues their samples."""

    cache: SharedPrefixCache
    rows: list[Row]
    """The rows that are decoded."""
    tokens: Int64[Tensor, " S"]
    """The last sampled token of each row, the model's next input."""
    positions: Int64[Tensor, " S"]
    """Its position, counted from the start of the prompt."""
    kept: list[Row] = field(default_factory=list[Row])
    """Finished rows that may be continued."""

    def record(
        self, tokens: Int64[Tensor, " S"], drawn: Iterable[tuple[int, float, Tensor | None]], *, keeps: bool
    ) -> list[Row]:
        """Appends one token to every row; removes and returns the rows that it finishes.

        With `keeps`, those whose requests say so are kept.
        """
        ended = [row.append(*one) for row, one in zip(self.rows, drawn, strict=True)]
        gone = [row for row, has_ended in zip(self.rows, ended, strict=True) if has_ended]
        self.tokens, self.positions = tokens, self.positions + 1
        if gone:
            decoded = [i for i, has_ended in enumerate(ended) if not has_ended]
            kept = [i for i, row in enumerate(self.rows) if ended[i] and keeps and row.request.keeps]
            order = self._arrange(decoded, [*self._places_of_kept(), *kept])[: len(decoded)]
            index = torch.tensor(order, dtype=torch.int64, device=tokens.device)
            self.tokens, self.positions = self.tokens[index], self.positions[index]
        return gone

    def join(self, requested: Mapping[tuple[str, int], Row]) -> list[Row]:
        """Decodes those of `requested`, by the sample that they continue, which are kept and fit here.

        Returns them. Call `inputs` before anything else is done with the cohort.
        """
        joining = {
            place: requested[row.sample]
            for place, row in zip(self._places_of_kept(), self.kept, strict=True)
            if row.sample in requested and self._fits(place, requested[row.sample].request)
        }
        if joining:
            size = len(self.rows)
            waiting = [place for place in self._places_of_kept() if place not in joining]
            order = self._arrange([*range(size), *joining], waiting)
            self.rows[size:] = [joining[place] for place in order[size : len(self.rows)]]
        return list(joining.values())

    def _fits(self, place: int, request: RolloutRequest) -> bool:
        new = len(request.prompt.token_ids) - self.cache.known(place)
        # the last token is never an input
        return self.cache.lengths[place] + new + request.params.max_tokens - 1 <= self.cache.max_tokens

    def inputs(self) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """The new tokens of all rows end to end, and their positions."""
        tokens, positions, last = [self.tokens], [self.positions], [self.positions]
        for place in range(len(self.tokens), len(self.rows)):
            ids, known = self.rows[place].request.prompt.token_ids, self.cache.known(place)
            tokens.append(torch.tensor(ids[known:], device=self.tokens.device))
            positions.append(torch.arange(known, len(ids), device=self.tokens.device))
            last.append(positions[-1][-1:])
            self.cache.joining.append(len(ids) - known)
        self.positions = torch.cat(last)
        return torch.cat(tokens), torch.cat(positions)

    def forget(self, sample: tuple[str, int] | None = None) -> None:
        """Drops what is kept, of one sample or of all."""
        places = zip(self._places_of_kept(), self.kept, strict=True)
        kept = [place for place, row in places if sample is not None and row.sample != sample]
        if len(kept) < len(self.kept):
            self._arrange(range(len(self.rows)), kept)

    def _places_of_kept(self) -> range:
        return range(len(self.rows), len(self.rows) + len(self.kept))

    def _arrange(self, decoded: Sequence[int], kept: Sequence[int]) -> list[int]:
        """As `SharedPrefixCache.arrange`."""
        rows, order = [*self.rows, *self.kept], self.cache.arrange(decoded, kept)
        self.rows = [rows[i] for i in order[: len(decoded)]]
        self.kept = [rows[i] for i in order[len(decoded) :]]
        return order
