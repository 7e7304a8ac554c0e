"""Forms: the rows that a loss makes of one comparison, each a signed sum of scores with a label.

    pairs              + better - other, label P                            DPO and most others
    singles            + better, label P, and + other, label 1 - P          KTO, BCO, NCA, APO-zero
    pair_and_single    the pair, and P times "+ better, label 0"            APO-down
    against_own        the pair, and "+ own - mean of the pair, label 0"    SPAC
    revision           second answers: + better - other after the other and after the better one, and both
                       half each, with the pair's own halves               SRPO

`stack` makes the tensors of many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rlhf.algos.preference.pairing import Comparison
from rlhf.tensors.contrasts import Contrasts
from rlhf.types import Source


@dataclass(frozen=True, slots=True)
class Row:
    """One contrast: `Row(((0, 1.0), (2, -1.0)), target=0.8)` is completion 0 over completion 2."""

    entries: tuple[tuple[int, float], ...]
    """Completions of the group, each with the coefficient of its score in the margin."""
    target: float
    """P(what has + is better), or P(it is good) for a single."""
    weight: float = 1.0
    """Factor of its loss."""
    share: float = 1.0
    """Share of a comparison. 0: a further term of the loss, which metrics do not count."""

    def shifted(self, first: int) -> Row:
        """The same for a group whose first completion has the number `first`."""
        return replace(self, entries=tuple((first + i, coefficient) for i, coefficient in self.entries))


@dataclass(frozen=True, slots=True)
class Form:
    """The rows of a comparison: `pairs(Comparison(0, 1))`."""

    rows: Callable[[Comparison, Sequence[Source]], tuple[Row, ...]]
    """A comparison, and the source of each completion of its group -> its rows."""
    takes_singles: bool
    """Whether a completion can be judged alone (`Comparison.other` None)."""
    revises: bool = False
    """Whether its rows are of a pair and the four second answers made of it (rlhf/data/revision.py)."""

    def __call__(self, comparison: Comparison, sources: Sequence[Source] = ()) -> tuple[Row, ...]:
        if comparison.other is None and not self.takes_singles:
            raise ValueError(
                "the algorithm compares pairs, and there is a completion that is judged alone; "
                "take kto, bco, nca or apo_zero, or give two completions of a prompt"
            )
        return self.rows(comparison, sources)


def _pair(comparison: Comparison, sources: Sequence[Source]) -> tuple[Row, ...]:
    assert comparison.other is not None
    return (Row(((comparison.better, 1.0), (comparison.other, -1.0)), comparison.probability),)


def _pair_and_single(comparison: Comparison, sources: Sequence[Source]) -> tuple[Row, ...]:
    assert comparison.other is not None
    sides = ((comparison.better, comparison.probability), (comparison.other, 1.0 - comparison.probability))
    down = tuple(Row(((i, 1.0),), target=0.0, weight=p, share=0.0) for i, p in sides if p > 0)
    return (*_pair(comparison, sources), *down)


pairs = Form(_pair, takes_singles=False)
"""One row: the better completion minus the other."""

pair_and_single = Form(_pair_and_single, takes_singles=False)
"""The pair, and a row that makes the better completion worse (with P; the other with 1 - P)."""


def singles(weight: float = 1.0) -> Form:
    """A row for each side, without the other. In a pair each has the factor `weight`: 1/2 gives the mean of
    the two losses and 1 their sum, as TRL's trainers do. A completion judged alone has the factor 1.
    """

    def rows(comparison: Comparison, sources: Sequence[Source]) -> tuple[Row, ...]:
        better = Row(((comparison.better, 1.0),), comparison.probability)
        if comparison.other is None:
            return (better,)
        other = Row(((comparison.other, 1.0),), 1.0 - comparison.probability)
        return tuple(replace(row, weight=weight, share=0.5) for row in (better, other))

    return Form(rows, takes_singles=True)


def against_own(pair_weight: float) -> Form:
    """The pair, weighted; and each sample that is no data, over the mean of the pair, with label 0: it is to
    become less likely than the data. Several samples share the weight 1.
    """

    def rows(comparison: Comparison, sources: Sequence[Source]) -> tuple[Row, ...]:
        pair = tuple(replace(row, weight=pair_weight) for row in _pair(comparison, sources))
        own = [i for i, source in enumerate(sources) if source != Source.DATA]
        data = tuple((i, -0.5) for i, _ in pair[0].entries)
        down = (Row(((i, 1.0), *data), target=0.0, weight=1.0 / len(own), share=0.0) for i in own)
        return (*pair, *down)

    return Form(rows, takes_singles=False)


def revision(mix: float) -> Form:
    """Three rows of a pair w, l with the label P, of second answers w|l (w after l) and so on (SRPO).

        + w|l - l|l, label P, and + l|w - w|w, label 1 - P: the improver, (1 - mix) / 2 each
        + w|l / 2 - l|w / 2 + w / 2 - l / 2, label P: writer and improver together, mix

    Completions of the group are 0 and 1, the pair, and 2 + 2 a + b, completion b after completion a.
    """

    def rows(comparison: Comparison, sources: Sequence[Source]) -> tuple[Row, ...]:
        won, lost, p = comparison.better, comparison.other, comparison.probability
        assert lost is not None and {won, lost} == {0, 1}

        def after(first: int, second: int) -> int:
            return 2 + 2 * first + second

        improver = (1.0 - mix) / 2
        both = ((after(lost, won), 0.5), (after(won, lost), -0.5), (won, 0.5), (lost, -0.5))
        return (
            Row(((after(lost, won), 1.0), (after(lost, lost), -1.0)), p, improver, improver),
            Row(((after(won, lost), 1.0), (after(won, won), -1.0)), 1.0 - p, improver, improver),
            Row(both, p, mix, mix),
        )

    return Form(rows, takes_singles=False, revises=True)


def stack(rows: Sequence[Row]) -> Contrasts:
    """The rows as tensors, each one contrast; completions are sequences by the same numbers."""
    entries = [(i, coefficient, m) for m, row in enumerate(rows) for i, coefficient in row.entries]
    return Contrasts(
        sequence=torch.tensor([i for i, _, _ in entries], dtype=torch.int64),
        coefficient=torch.tensor([c for _, c, _ in entries], dtype=torch.float32),
        contrast=torch.tensor([m for _, _, m in entries], dtype=torch.int64),
        target=torch.tensor([row.target for row in rows], dtype=torch.float32),
        weight=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        share=torch.tensor([row.share for row in rows], dtype=torch.float32),
        offset=torch.zeros(len(rows), dtype=torch.float32),
    )
