"""`rlhf pairs order`: the lines of a dataset from easy to hard, by the perplexity of their answers.

The warm-up of iTool (arXiv:2501.09766): fine-tune on easy answers before hard ones, then search trees of the
hardest. What is hard is what the model finds unlikely. Answers with a call and answers without one are of two
kinds, of each of which the same share is hard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from rlhf.data.completions import OfflineDataset
from rlhf.data.rows import Row, read_rows
from rlhf.distributed.world import World
from rlhf.files import write_atomically
from rlhf.learn.experience import pack_groups
from rlhf.learn.logprobs import sequence_logprobs
from rlhf.models.policy import Policy
from rlhf.pairs.files import PairsError
from rlhf.torch_typed import numbers
from rlhf.types import Group, Trajectory

AT_ONCE = 64
"""Answers that are packed together; forward passes have at most the tokens that the settings say."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """How the lines are cut. Raises PairsError for a share or a number of parts that is none."""

    parts: int = 3
    """Files, one easier than the next."""
    share: float = 0.3
    """Share of each kind that counts as hard."""
    call: str = ")"
    """Text that answers with a call have, and others do not."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.parts < 1:
            raise PairsError(
                f"--share must be above 0 and at most 1, and --parts at least 1, got {self.share} and "
                f"{self.parts}"
            )


@dataclass(frozen=True, slots=True)
class Answered:
    """A line of the dataset and its right answer."""

    row: Row
    group: Group

    @property
    def gold(self) -> Trajectory:
        """The answer with the highest reward, the first of several."""
        return max(self.group.trajectories, key=lambda t: -math.inf if t.reward is None else t.reward)


def answered(dataset: OfflineDataset) -> list[Answered]:
    """The lines of a dataset with their answers, without those that the dataset left out.

    Raises PairsError: lines with the same prompt have become one group, whose answers are not told apart.
    """
    by_id = {group.prompt.id: group for group in dataset.groups}
    rows = list(read_rows(dataset.source))
    found = [Answered(row, by_id[row.id]) for row in rows if row.id in by_id]
    if merged := len(rows) - len(found) - dataset.skipped - dataset.identical:
        raise PairsError(
            f"{dataset.source}: {merged} lines have the prompt of another line, so that they are one group "
            "of several answers; leave one line of each prompt, or give chats (a column messages)"
        )
    return found


def perplexities(
    lines: Sequence[Answered], policy: Policy, device: torch.device, budget: int
) -> Iterator[float]:
    """exp of the mean of `-log p` over the tokens of each right answer, given its prompt, at temperature 1.

    A forward pass has at most `budget` tokens.
    """
    world = World(0, 1, device)
    for start in range(0, len(lines), AT_ONCE):
        some = lines[start : start + AT_ONCE]
        packed = pack_groups([Group(one.group.prompt, (one.gold,)) for one in some], device=device)
        sums = sequence_logprobs(policy, packed, world, temperature=1.0, budget=budget)
        for total, one in zip(numbers(sums), some, strict=True):
            yield math.exp(-total / sum(one.gold.loss_mask))


def hardest(values: Sequence[float], kinds: Sequence[bool], share: float) -> list[int]:
    """Places of the hardest: of each kind the `share` with the highest values, rounded up; easy to hard.

    Of equal values the later place counts as harder.
    """
    chosen: list[int] = []
    for kind in (True, False):
        places = sorted((i for i, own in enumerate(kinds) if own == kind), key=lambda i: (values[i], i))
        count = math.ceil(share * len(places) - 1e-9)
        chosen += places[len(places) - count :]
    return sorted(chosen, key=lambda i: (values[i], i))


def cut(count: int, parts: int) -> list[range]:
    """`count` places as `parts` ranges whose sizes differ by at most one, the longer ones first."""
    size, rest = divmod(count, parts)
    starts = [i * size + min(i, rest) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def check_new(folder: Path) -> None:
    """Raises PairsError: something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PairsError(f"--out: {folder} holds files already; name a folder that is new or empty")


def write_order(
    folder: Path, lines: Sequence[Answered], values: Sequence[float], cuts: Cuts
) -> Iterator[str]:
    """Writes FOLDER/part_1.jsonl and so on, from easy to hard, and FOLDER/hard.jsonl; returns lines to show.

    Each line is that of the dataset and `perplexity`. Raises PairsError: there are fewer lines than parts.
    """
    if len(lines) < cuts.parts:
        raise PairsError(f"{len(lines)} lines cannot be cut into {cuts.parts} parts: lower --parts")
    order = sorted(range(len(lines)), key=lambda i: (values[i], i))
    kinds = [cuts.call in one.gold.text for one in lines]
    folder.mkdir(parents=True, exist_ok=True)
    for number, places in enumerate(cut(len(order), cuts.parts), start=1):
        chosen = [order[i] for i in places]
        _write(folder / f"part_{number}.jsonl", lines, values, chosen)
        low, high = values[chosen[0]], values[chosen[-1]]
        yield f"part_{number}.jsonl  {len(chosen)} lines, perplexity {low:.3f} to {high:.3f}"
    chosen = hardest(values, kinds, cuts.share)
    _write(folder / "hard.jsonl", lines, values, chosen)
    calls = sum(kinds[i] for i in chosen)
    yield (
        f"hard.jsonl    {len(chosen)} lines: {calls} of {sum(kinds)} with a call, {len(chosen) - calls} of "
        f"{len(kinds) - sum(kinds)} without"
    )


def _write(file: Path, lines: Sequence[Answered], values: Sequence[float], places: Sequence[int]) -> None:
    texts: list[str] = []
    for i in places:
        columns: Mapping[str, Any] = {**lines[i].row.columns, "perplexity": round(values[i], 6)}
        texts.append(json.dumps(columns, ensure_ascii=False) + "\n")
    write_atomically(file, "".join(texts))
