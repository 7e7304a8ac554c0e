"""Ragged groups -> packed tensors: a prompt once, its completions behind it, nothing padded.

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

from rlhf.torch_typed import integers
from rlhf.types import Candidates, Experience, Images

Layout = Literal["shared_prefix", "packed", "padded"]
"""A prompt once a group; a prompt once a sequence, end to end; a padded row a sequence."""


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where one group lies in the packed tokens: the prompt from `start`, its completions right behind it."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.completions)


@dataclass(frozen=True, slots=True)
class Packed:
    """Groups for one forward pass. `T` tokens with the prompts, `N` of completions."""

    token_ids: Tensor
    """`[T]`"""
    positions: Tensor
    """`[T]`: every completion continues the positions of its prompt."""
    rows: Tensor
    """`[N]`: index into `T` of the token whose hidden state predicts completion token n."""
    targets: Tensor
    """`[N]`: the completion tokens."""
    spans: tuple[GroupSpan, ...]
    images: tuple[Images | None, ...] = ()
    """Of each span's prompt; empty where none has any. The positions above do not know of them."""
    candidates: Candidates | None = None
    """What each of the N tokens was drawn from."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Part of an Experience for one forward pass, in whole sequences."""

    packed: Packed
    index: Tensor
    """`[N]`: which tokens of the experience these are."""


def pack(
    prompts: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    images: Sequence[Images | None] = (),
) -> Packed:
    """Packs groups one after another; `completions[i]` are those of `prompts[i]`. None of them is empty.

    `images[i]` are the pictures of `prompts[i]`; all of them may be left out.
    """
    assert not images or len(images) == len(prompts)
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
        begin = start + span.prompt
        for length in span.completions:
            positions.append(torch.arange(span.prompt, span.prompt + length))
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
    )


def least(device: torch.device) -> Packed:
    """One token after a prompt of one: a pass that has to be made with nothing in it."""
    one = torch.zeros(1, dtype=torch.long, device=device)
    return pack([one], [[one]])


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences `[first, last)` of one group: what goes through the model together with its prompt."""

    group: int
    first: int
    last: int
    cost: int
    """Tokens of a forward pass: the prompt once and all these sequences."""


def cut(experience: Experience, groups: Sequence[int], budget: int, *, share: bool) -> list[Unit]:
    """Groups as units of at most `budget` tokens.

    A larger group is cut between sequences (its prompt repeated), as is every group where prompts are not to
    be shared; a single sequence of more than `budget` tokens is a unit of its own.
    """
    lengths = _lengths(experience)
    members: dict[int, list[int]] = {g: [] for g in groups}
    for sequence, group in enumerate(integers(experience.group)):
        if group in members:
            members[group].append(sequence)
    units: list[Unit] = []
    for group, sequences in members.items():
        prompt = len(experience.prompts[group])
        first, cost = sequences[0], prompt
        for sequence in sequences:
            if sequence > first and (not share or cost + lengths[sequence] > budget):
                units.append(Unit(group, first, sequence, cost))
                first, cost = sequence, prompt
            cost += lengths[sequence]
        units.append(Unit(group, first, sequences[-1] + 1, cost))
    return units


def fill(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Deals units to bins of at most `budget` tokens, largest first, each into the first bin with room.

    Deterministic: equal costs keep their order, and so do the units of a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(range(len(units)), key=lambda u: -units[u].cost):
        cost = units[unit].cost
        for i, left in enumerate(room):
            if cost <= left:
                bins[i].append(unit)
                room[i] -= cost
                break
        else:
            bins.append([unit])
            room.append(budget - cost)
    return [[units[u] for u in sorted(b)] for b in bins]


def fill_rows(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Deals units of one sequence each to bins of at most `budget` tokens with padding, longest first."""
    bins: list[list[Unit]] = []
    for unit in sorted(units, key=lambda u: -u.cost):
        if bins and bins[-1][0].cost * (len(bins[-1]) + 1) <= budget:
            bins[-1].append(unit)
        else:
            bins.append([unit])
    return bins


def microbatches(
    experience: Experience, groups: Sequence[int], budget: int, *, layout: Layout = "shared_prefix"
) -> Iterator[Microbatch]:
    """The given groups of an experience, packed for forward passes of at most `budget` tokens.

    The budget counts what `layout` computes: a prompt once a group or once a sequence, padding or none.
    """
    lengths = _lengths(experience)
    starts = [0, *accumulate(lengths)]
    parts = cut(experience, groups, budget, share=layout == "shared_prefix")
    for units in (fill_rows if layout == "padded" else fill)(parts, budget):
        index = torch.cat([torch.arange(starts[u.first], starts[u.last]) for u in units])
        completions = [
            torch.split(experience.token_ids[starts[u.first] : starts[u.last]], lengths[u.first : u.last])
            for u in units
        ]
        images = [experience.images[u.group] for u in units] if experience.images else ()
        packed = pack([experience.prompts[u.group] for u in units], completions, images)
        index = index.to(experience.token_ids.device)
        if experience.candidates is not None:
            packed = replace(packed, candidates=experience.candidates.take(index))
        yield Microbatch(packed, index)


def _lengths(experience: Experience) -> list[int]:
    """Tokens of each sequence."""
    return integers(torch.bincount(experience.sequence, minlength=len(experience.group)))


def separate(packed: Packed) -> Packed:
    """The same sequences, each behind a prompt of its own; rows and targets keep their order."""
    if all(len(span.completions) == 1 for span in packed.spans):
        return packed
    parts = list(_sequences(packed))
    images = [i for i, span in zip(packed.images, packed.spans, strict=False) for _ in span.completions]
    return pack([prompt for prompt, _ in parts], [[completion] for _, completion in parts], images)


def _sequences(packed: Packed) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompt and completion of each."""
    for span in packed.spans:
        prompt = packed.token_ids[span.start : span.start + span.prompt]
        own = packed.token_ids[span.start + span.prompt : span.end]
        for completion in torch.split(own, list(span.completions)):
            yield prompt, completion


def padded(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """The same groups as one right-padded row a sequence: token ids and attention mask `[S, L]`, rows `[N]`.

    The slow form, for models whose attention cannot be replaced, and the specification of the packed ones.
    `rows` index the flattened `[S * L]` hidden states.
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
