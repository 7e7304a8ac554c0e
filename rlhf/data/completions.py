"""Reads datasets of completions (offline data): prompts, completions and rewards become scored groups.

`rlhf/data/preferences.py` has the formats. Nobody recorded with what probability the completions were
sampled, so their trajectories have no `rollout_logprobs`. The end-of-sequence token is appended to each
completion, except where a column `finish_reason` says "length" (truncated); a list there has a word for each
completion of the line. Prompt and completion are tokenised apart and joined. `rlhf/data/chats.py` makes the
trajectories of chats of several turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.config.data import DataConfig
from rlhf.data.chats import ChatTokenizer
from rlhf.data.preferences import FINISH_REASON, Format, Line, find_format
from rlhf.data.prompts import PromptDataset, Row, first_row, tokenized
from rlhf.models.vision.processor import Processor
from rlhf.types import Completion, FinishReason, Group, Prompt, Source, Trajectory


@dataclass(frozen=True, slots=True)
class OfflineDataset:
    """The completions of a dataset, grouped by prompt, in the order of the file.

    Example: a file with three prompts, one of them on two lines and one too long, gives two groups and
    `skipped=1`.
    """

    groups: tuple[Group, ...]
    columns: tuple[str, ...]
    """Columns of every line other than prompt, completion and reward; reward functions may ask for them."""
    skipped: int
    """Number of lines left out because prompt or completion is longer than its limit."""
    source: Path
    splitting: tuple[str, ...] = ()
    """Columns that differ between lines with the same prompt, so that these lines form several groups."""
    identical: int = 0
    """Number of pairs left out because their two completions are the same."""
    imitates: bool = False
    """Whether there is no column of rewards, so that each completion has the reward 1."""

    @property
    def prompts(self) -> PromptDataset:
        """The prompts without completions, one for each group."""
        return PromptDataset(tuple(g.prompt for g in self.groups), self.columns, self.skipped, self.source)

    @property
    def num_completions(self) -> int:
        return sum(len(g.trajectories) for g in self.groups)


def load_offline(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    section: DataConfig,
    *,
    max_completion_tokens: int,
    eos_token_id: int,
    end_token_ids: Iterable[int] = (),
    processor: Processor | None = None,
) -> OfflineDataset:
    """Reads, checks and tokenises every line.

    A completion is text, or one chat message of the assistant. A reward is a number, or null for a completion
    that is not learned from. If `section.reward_column` is None, no completion has a reward yet, and reward
    functions score them later. `end_token_ids` are tokens by which a chat template may end a turn, beside
    `eos_token_id`.

    Raises ValueError, with file and line: as in `load_prompts`; a missing column; a completion that is empty,
    not text, or too long (unless `section.long_prompts` is "skip"); a reward that is not a finite number.
    """
    path = Path(path)
    found = find_format(first_row(path), section)
    groups: dict[tuple[Any, ...], Group] = {}
    too_long, identical = list[str](), 0
    ends = frozenset({eos_token_id, *end_token_ids})
    tokens = ChatTokenizer(tokenizer, eos_token_id, ends, takes_images=processor is not None)
    for row, prompt, line, trajectories in _lines(path, found, tokens, section, processor):
        longest = max(len(t.token_ids) for t in trajectories)
        if len(prompt.token_ids) > section.max_prompt_tokens or longest > max_completion_tokens:
            too_long.append(row.where)
            continue
        if line.says_nothing:
            identical += 1
            continue
        prompt = replace(prompt, columns=found.others(prompt.columns))
        group = Group(prompt, trajectories, duels=line.duels)
        key = (row.id,)
        if found.merges and line.chat is None:
            key = (prompt.token_ids, prompt.images, json.dumps(prompt.columns, sort_keys=True, default=repr))
        first = groups.setdefault(key, group)
        if first is not group:
            groups[key] = replace(first, trajectories=first.trajectories + trajectories)
    if too_long and (section.long_prompts == "refuse" or not groups):
        raise ValueError(_too_long(path, too_long, section, max_completion_tokens, skips=bool(groups)))
    if not groups:
        raise ValueError(f"{path}: in all {identical} lines chosen and rejected are the same")
    listed = tuple(groups.values())
    splitting = _splitting(listed) if found.merges else ()
    names = tuple(listed[0].prompt.columns)
    return OfflineDataset(listed, names, len(too_long), path, splitting, identical, found.imitates)


def _too_long(path: Path, places: Sequence[str], section: DataConfig, limit: int, *, skips: bool) -> str:
    return (
        f"{path}: {len(places)} lines are longer than data.max_prompt_tokens = {section.max_prompt_tokens} "
        f"or rollout.max_completion_tokens = {limit} (the end-of-sequence token counts), the first is "
        f"{places[0]}; raise the limit" + (", or set data.long_prompts to skip" if skips else "")
    )


def _splitting(groups: Sequence[Group]) -> tuple[str, ...]:
    """Columns in which groups with the same prompt differ."""
    first: dict[Any, Prompt] = {}
    found: dict[str, None] = {}
    for prompt in (g.prompt for g in groups):
        other = first.setdefault((prompt.token_ids, prompt.images), prompt).columns
        found |= dict.fromkeys(name for name, value in prompt.columns.items() if other[name] != value)
    return tuple(found)


def _lines(
    path: Path,
    found: Format,
    tokens: ChatTokenizer,
    section: DataConfig,
    processor: Processor | None,
) -> Iterator[tuple[Row, Prompt, Line, tuple[Trajectory, ...]]]:
    """Every line with its prompt and its completions, tokenised."""
    columns = section.prompt_column, section.image_column
    for rows, prompts in tokenized(path, tokens.tokenizer, *columns, processor, change=found.prompt):
        lines = [found.read(row) for row in rows]
        trajectories = _trajectories(rows, lines, tokens)
        yield from zip(rows, prompts, lines, trajectories, strict=True)


def _trajectories(
    rows: Sequence[Row], lines: Sequence[Line], tokens: ChatTokenizer
) -> Iterator[tuple[Trajectory, ...]]:
    """The trajectories of each line."""
    texts = [text for line in lines for text in line.texts]
    encoded = iter(_encoded(tokens.tokenizer, texts))
    for row, line in zip(rows, lines, strict=True):
        reasons = _finish_reasons(row, len(line.rewards))
        if line.chat is not None:
            yield (tokens.trajectory(row, line.chat, line.rewards[0], reasons[0]),)
            continue
        of_line: list[Trajectory] = []
        for index, (text, reward, reason) in enumerate(zip(line.texts, line.rewards, reasons, strict=True)):
            ids = [*next(encoded), tokens.eos_token_id] if reason == FinishReason.STOP else next(encoded)
            completion = Completion(row.id, index, tuple(ids), None, reason, versions=(), source=Source.DATA)
            of_line.append(Trajectory.single_turn(completion, text=text, reward=reward, objectives={}))
        yield tuple(of_line)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # a tokenizer refuses an empty list
    return cast(Any, tokenizer)(texts, add_special_tokens=False)["input_ids"] if texts else []


def _finish_reasons(row: Row, count: int) -> list[FinishReason]:
    """That of each of the `count` completions of a line."""
    given: object = row.columns.get(FINISH_REASON, "stop")
    values = cast(list[object], given) if isinstance(given, list) else [given] * count
    if len(values) != count or any(value not in ("stop", "length") for value in values):
        many = "" if count == 1 else f", or a list of {count} of these, one for each completion"
        raise ValueError(
            f"{row.where}: column {FINISH_REASON!r} must be stop or length{many}, got {given!r:.80}"
        )
    return [FinishReason(str(value)) for value in values]


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a completion that is not truncated, the end-of-sequence token last."""
    ids = cast(list[int], cast(Any, tokenizer)(text, add_special_tokens=False)["input_ids"])
    return (*ids, cast(int, tokenizer.eos_token_id))
