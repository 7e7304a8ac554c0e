"""Packs groups into tensors without padding: each prompt once, its completions behind it; cuts microbatches.

group of prompt `p q r` with completions `a b` and `c`:

    token_ids  p q r a b c        positions  0 1 2 3 4 3
    rows       2 3 2              (where the hidden state stands that predicts a, b and c)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from rlhf.kernels.token_stats import IGNORED
from rlhf.tensors.candidates import Candidates
from rlhf.torch_typed import integers
from rlhf.types import Images, Observed, PackedGroups

Layout = Literal["shared_prefix", "packed", "padded"]
"""How a forward pass lays out groups:

shared_prefix   packed, each prompt once per group
packed          packed, each prompt repeated for every completion
padded          one right-padded row per sequence
"""


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where one group lies in the packed tokens: the prompt from `start`, its completions right behind it."""

    start: int
    prompt: int
    """Tokens of the prompt."""
    completions: tuple[int, ...]
    """Tokens of each completion."""

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: the prompt and one completion."""
        return self.prompt + max(self.completions, default=0)


@dataclass(frozen=True, slots=True)
class Packed:
    """Groups for one forward pass: `T` tokens of prompts and completions, `N` of them of completions."""

    token_ids: Tensor
    """`[T]`"""
    positions: Tensor
    """`[T]`: every completion continues the positions of its prompt."""
    rows: Tensor
    """`[N]`: index into `T` of the token whose hidden state predicts completion token n."""
    targets: Tensor
    """`[N]`: the completion tokens; `IGNORED` for a token outside the loss mask, which is read like any other
    (what a tool answered, for example) and of which no statistic is computed."""
    spans: tuple[GroupSpan, ...]
    images: tuple[Images | None, ...] = ()
    """Images of each span's prompt; empty where no prompt has any. `positions` does not account for them."""
    candidates: Candidates | None = None
    """The candidates that each of the N tokens was drawn from; None: the whole vocabulary."""
    observed: tuple[tuple[Observed, ...], ...] = ()
    """The observations with images of each completion, in the order of the completions; empty where none has
    any. `positions` does not account for them either."""
    num_targets: int | None = None
    """The number of targets that are not `IGNORED`; None: all of them."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(span.longest for span in self.spans)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Sequences of an Experience for one forward pass; no sequence is cut."""

    packed: Packed
    index: Tensor
    """`[N]`: the places of its completion tokens in the experience."""
    sequences: Tensor
    """`[S]`, on the CPU: the numbers of its sequences in the experience, in the order of their tokens."""


def pack(
    prompts: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    images: Sequence[Images | None] = (),
    observed: Sequence[tuple[Observed, ...]] = (),
) -> Packed:
    """Packs groups one after another; `completions[i]` belong to `prompts[i]`, and none is empty.

    `images[i]` are the images of `prompts[i]`, and `observed[n]` the observations with images of completion
    n, counted over all groups; either may be left out where there are none.
    """
    assert not images or len(images) == len(prompts)
    assert not observed or len(observed) == sum(map(len, completions))
    token_ids: list[Tensor] = []
    positions: list[Tensor] = []
    rows: list[Tensor] = []
    spans: list[GroupSpan] = []
    start = 0
    for prompt, group in zip(prompts, completions, strict=True):
        span = GroupSpan(start, len(prompt), tuple(len(c) for c in group))
        assert span.prompt and all(span.completions), "a prompt or completion without tokens"
        token_ids += [prompt, *group]
        positions.append(torch.arange(span.prompt))
        # first token of the next completion
        begin = start + span.prompt
        for length in span.completions:
            positions.append(torch.arange(span.prompt, span.prompt + length))
            # the last token of the prompt predicts the first of every completion
            rows += [torch.tensor([start + span.prompt - 1]), torch.arange(begin, begin + length - 1)]
            begin += length
        spans.append(span)
        start = span.end
    targets = torch.cat([c for group in completions for c in group])
    device = targets.device
    return Packed(
        token_ids=torch.cat(token_ids),
        positions=torch.cat(positions).to(device),
        rows=torch.cat(rows).to(device),
        targets=targets,
        spans=tuple(spans),
        images=tuple(images) if any(images) else (),
        observed=tuple(observed) if any(observed) else (),
    )


def least(device: torch.device) -> Packed:
    """The smallest pack, a prompt and a completion of one token each: for a pass whose result is not used."""
    one = torch.zeros(1, dtype=torch.long, device=device)
    return pack([one], [[one]])


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences `[first, last)` of one group, which go through the model together with their prompt."""

    group: int
    first: int
    last: int
    cost: int
    """Tokens in the forward pass: the prompt once (or, where it is not shared, once for each sequence) and
    the completions of all these sequences; padding does not count."""
    longest: int = 0
    """Tokens of the longest of its sequences, prompt included; needed for padded rows alone."""


def cut(experience: PackedGroups, groups: Sequence[int], budget: int, *, share: bool) -> list[Unit]:
    """Cuts groups into units of at most `budget` tokens each.

    A larger group is cut between sequences, and its prompt is repeated in each unit. Without `share`, every
    sequence is a unit. A single sequence of more than `budget` tokens is a unit of its own. Where sequences
    are compared (`contrasts`), a group is one unit, however large it is.
    """
    lengths = _lengths(experience)
    members: dict[int, list[int]] = {g: [] for g in groups}
    for sequence, group in enumerate(integers(experience.group)):
        if group in members:
            members[group].append(sequence)
    units: list[Unit] = []
    for group, sequences in members.items():
        prompt = len(experience.prompts[group])
        if experience.contrasts is not None:
            prompts = prompt * (1 if share else len(sequences))
            sizes = [lengths[s] for s in sequences]
            span = sequences[0], sequences[-1] + 1
            units.append(Unit(group, *span, prompts + sum(sizes), prompt + max(sizes)))
            continue
        first, cost = sequences[0], prompt
        for sequence in sequences:
            if sequence > first and (not share or cost + lengths[sequence] > budget):
                units.append(Unit(group, first, sequence, cost, prompt + max(lengths[first:sequence])))
                first, cost = sequence, prompt
            cost += lengths[sequence]
        last = sequences[-1] + 1
        units.append(Unit(group, first, last, cost, prompt + max(lengths[first:last])))
    return units


def fill(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Puts units into bins of at most `budget` tokens (first-fit decreasing).

    The largest unit comes first, and each goes into the first bin with room. Deterministic: units of equal
    cost are taken in their given order, and so are the units within a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(range(len(units)), key=lambda u: -units[u].cost):
        cost = units[unit].cost
        for i, free in enumerate(room):
            if cost <= free:
                bins[i].append(unit)
                room[i] -= cost
                break
        else:
            bins.append([unit])
            room.append(budget - cost)
    return [[units[u] for u in sorted(b)] for b in bins]


def fill_rows(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Puts units into bins of at most `budget` tokens, padding included; the longest sequences first."""
    bins: list[list[Unit]] = []
    rows = 0
    for unit in sorted(units, key=lambda u: -u.longest):
        # the first unit of a bin has its longest sequence: every row of the bin is padded to that
        rows += unit.last - unit.first
        if bins and bins[-1][0].longest * rows <= budget:
            bins[-1].append(unit)
        else:
            bins.append([unit])
            rows = unit.last - unit.first
    return bins


def microbatches(
    experience: PackedGroups, groups: Sequence[int], budget: int, *, layout: Layout = "shared_prefix"
) -> Iterator[Microbatch]:
    """Packs the given groups of an experience for forward passes of at most `budget` tokens.

    The budget counts the tokens that `layout` computes, repeated prompts and padding included. Tokens outside
    the loss mask are read, and no log-prob of them is computed.
    """
    lengths, wanted = _lengths(experience), _lengths(experience, experience.loss_mask)
    starts = [0, *accumulate(lengths)]
    candidates = experience.candidates
    if candidates is not None and lengths != wanted:
        candidates = candidates.only(experience.loss_mask)
    parts = cut(experience, groups, budget, share=layout == "shared_prefix")
    for units in (fill_rows if layout == "padded" else fill)(parts, budget):
        index = torch.cat([torch.arange(starts[u.first], starts[u.last]) for u in units])
        completions = [
            torch.split(experience.token_ids[starts[u.first] : starts[u.last]], lengths[u.first : u.last])
            for u in units
        ]
        images = [experience.images[u.group] for u in units] if experience.images else ()
        observed = [o for u in units for o in experience.observed[u.first : u.last]]
        packed = pack([experience.prompts[u.group] for u in units], completions, images, observed)
        index = index.to(experience.token_ids.device)
        num_targets = sum(sum(wanted[u.first : u.last]) for u in units)
        if num_targets < len(index):
            targets = packed.targets.masked_fill(~experience.loss_mask[index], IGNORED)
            packed = replace(packed, targets=targets, num_targets=num_targets)
        if candidates is not None:
            packed = replace(packed, candidates=candidates.take(index))
        sequences = [torch.arange(u.first, u.last) for u in units]
        yield Microbatch(packed, index, torch.cat(sequences))


def _lengths(experience: PackedGroups, mask: Tensor | None = None) -> list[int]:
    """Completion tokens of each of the S sequences, or only those in `mask` `[N]`."""
    sequence = experience.sequence if mask is None else experience.sequence[mask]
    return integers(torch.bincount(sequence, minlength=len(experience.group)))


def separate(packed: Packed) -> Packed:
    """Repeats the prompt for every completion: groups of one. Rows and targets keep their order."""
    if all(len(span.completions) == 1 for span in packed.spans):
        return packed
    parts = list(_sequences(packed))
    images = [i for i, span in zip(packed.images, packed.spans, strict=False) for _ in span.completions]
    prompts, completions = [prompt for prompt, _ in parts], [[completion] for _, completion in parts]
    return pack(prompts, completions, images, packed.observed)


def _sequences(packed: Packed) -> Iterator[tuple[Tensor, Tensor]]:
    """The token ids of prompt and completion of each sequence."""
    for span in packed.spans:
        prompt = packed.token_ids[span.start : span.start + span.prompt]
        completions = packed.token_ids[span.start + span.prompt : span.end]
        for completion in torch.split(completions, list(span.completions)):
            yield prompt, completion


def padded(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """One right-padded row per sequence: token ids `[S, L]`, attention mask `[S, L]`, rows `[N]`.

    `rows` index the hidden states flattened to `[S * L, H]`. This slow form is for models whose attention
    cannot be replaced, and it is the specification of the packed layouts.
    """
    parts = list(_sequences(packed))
    sequences = [torch.cat(part) for part in parts]
    prompts = [len(prompt) for prompt, _ in parts]
    token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences], device=token_ids.device)
    width = token_ids.shape[1]
    mask = torch.arange(width, device=token_ids.device) < lengths[:, None]
    rows = [
        torch.arange(i * width + prompt - 1, i * width + len(s) - 1)
        for i, (s, prompt) in enumerate(zip(sequences, prompts, strict=True))
    ]
    return token_ids, mask.long(), torch.cat(rows).to(token_ids.device)
