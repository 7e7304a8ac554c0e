"""Reads datasets of completions (offline data): prompts, completions and rewards become scored groups.

    {"prompt": "Name a colour.", "completion": "Blue.", "reward": 0.8}
    {"prompt": "Name a colour.", "completion": "Seven.", "reward": 0.1, "finish_reason": "stop"}

All lines with the same prompt form one group. Nobody recorded with what probability the completions were
sampled, so their trajectories have no `rollout_logprobs`. The end-of-sequence token is appended to each
completion, except where a column `finish_reason` says "length" (truncated).
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.config.data import DataConfig
from rlhf.data.prompts import PromptDataset, Row, quoted, tokenized
from rlhf.models.vision.processor import Processor
from rlhf.types import Completion, FinishReason, Group, Prompt, Trajectory

FINISH_REASON = "finish_reason"


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
    processor: Processor | None = None,
) -> OfflineDataset:
    """Reads, checks and tokenises every line.

    A completion is text, or a list of chat messages of which the last one counts. A reward is a number, or
    null for a completion that is not learned from. If `section.reward_column` is None, no completion has a
    reward yet, and reward functions score them later.

    Raises ValueError, with file and line, whenever `load_prompts` does, and for a missing column, a
    completion that is empty or not text, a reward that is not a finite number, and completions longer than
    the limit unless `section.long_prompts` is "skip".
    """
    path = Path(path)
    members: dict[tuple[Any, ...], tuple[Prompt, list[Trajectory]]] = {}
    too_long: list[str] = []
    columns: Columns | None = None
    for rows, prompts in tokenized(path, tokenizer, section.prompt_column, section.image_column, processor):
        columns = columns or Columns.find(rows[0], section)
        trajectories = _trajectories(rows, columns, tokenizer, eos_token_id)
        for row, prompt, trajectory in zip(rows, prompts, trajectories, strict=True):
            prompt_tokens, completion_tokens = len(prompt.token_ids), len(trajectory.token_ids)
            if prompt_tokens > section.max_prompt_tokens or completion_tokens > max_completion_tokens:
                too_long.append(row.where)
                continue
            prompt = replace(prompt, columns=columns.others(prompt.columns))
            key = (prompt.token_ids, json.dumps(prompt.columns, sort_keys=True, default=repr))
            members.setdefault(key, (prompt, []))[1].append(trajectory)
    if too_long and (section.long_prompts == "refuse" or not members):
        raise ValueError(
            f"{path}: {len(too_long)} lines are longer than data.max_prompt_tokens = "
            f"{section.max_prompt_tokens} or rollout.max_completion_tokens = {max_completion_tokens} (the "
            f"end-of-sequence token counts), the first is {too_long[0]}; raise the limit"
            + (", or set data.long_prompts to skip" if members else "")
        )
    assert columns is not None
    groups = tuple(Group(prompt, tuple(trajectories)) for prompt, trajectories in members.values())
    names = tuple(groups[0].prompt.columns)
    return OfflineDataset(groups, names, skipped=len(too_long), source=path, splitting=_splitting(groups))


def _splitting(groups: Sequence[Group]) -> tuple[str, ...]:
    """Columns in which groups with the same prompt tokens differ."""
    first: dict[tuple[int, ...], Prompt] = {}
    found: dict[str, None] = {}
    for prompt in (g.prompt for g in groups):
        other = first.setdefault(prompt.token_ids, prompt).columns
        found |= dict.fromkeys(name for name, value in prompt.columns.items() if other[name] != value)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns that hold completion and reward, and whether there is a finish reason."""

    completion: str
    reward: str | None
    finish_reason: bool

    @classmethod
    def find(cls, row: Row, section: DataConfig) -> Columns:
        """The columns that the settings name. Raises ValueError if the dataset does not have one of them."""
        completion = section.completion_column
        if completion is None:
            completion = "response" if "response" in row.columns else "completion"
        wanted = {"data.completion_column": completion, "data.reward_column": section.reward_column}
        for setting, name in wanted.items():
            if name is not None and name not in row.columns:
                near = difflib.get_close_matches(name, row.columns, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                other = (
                    ", or to null to have the completions scored" if setting == "data.reward_column" else ""
                )
                raise ValueError(
                    f"{row.where}: no column {name!r} among {quoted(row.columns)}{hint} "
                    f"Set {setting} to its name{other}"
                )
        return cls(completion, section.reward_column, FINISH_REASON in row.columns)

    def others(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Columns other than completion, reward and finish reason."""
        taken = {self.completion, self.reward, FINISH_REASON}
        return {name: value for name, value in columns.items() if name not in taken}


def _trajectories(
    rows: Sequence[Row], columns: Columns, tokenizer: PreTrainedTokenizerBase, eos_token_id: int
) -> Iterator[Trajectory]:
    texts = [_text(row, columns.completion) for row in rows]
    encoded = cast(Any, tokenizer)(texts, add_special_tokens=False)["input_ids"]
    for row, text, token_ids in zip(rows, texts, encoded, strict=True):
        reason = _finish_reason(row) if columns.finish_reason else FinishReason.STOP
        ids = [*token_ids, eos_token_id] if reason == FinishReason.STOP else token_ids
        completion = Completion(row.id, 0, tuple(ids), None, reason, versions=())
        reward = None if columns.reward is None else _reward(row, columns.reward)
        yield Trajectory.single_turn(completion, text=text, reward=reward, objectives={})


def _text(row: Row, column: str) -> str:
    value: object = row.columns[column]
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = cast(Mapping[str, object], value[-1]).get("content")
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{row.where}: column {column!r} must be non-empty text or chat messages, "
            f"got {row.columns[column]!r:.80}"
        )
    return value


def _finish_reason(row: Row) -> FinishReason:
    value: object = row.columns[FINISH_REASON]
    if value not in ("stop", "length"):
        raise ValueError(f"{row.where}: column {FINISH_REASON!r} must be stop or length, got {value!r:.80}")
    return FinishReason(value)


def _reward(row: Row, column: str) -> float | None:
    value: object = row.columns[column]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{row.where}: column {column!r} must be a finite number or null, got {value!r:.80}")
    return float(value)


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a completion that is not truncated, the end-of-sequence token last."""
    ids = cast(list[int], cast(Any, tokenizer)(text, add_special_tokens=False)["input_ids"])
    return (*ids, cast(int, tokenizer.eos_token_id))
