"""Completions that are already there: prompts, completions and rewards of a dataset become scored groups.

    {"prompt": "Name a colour.", "completion": "Blue.", "reward": 0.8}
    {"prompt": "Name a colour.", "completion": "Seven.", "reward": 0.1, "finish_reason": "stop"}

All lines with the same prompt are one group. Who wrote the completions is not known, nor with what
probability: their trajectories have no `rollout_logprobs`. The end-of-sequence token is put behind each
completion, except where a column `finish_reason` says "length".
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
    """A dataset's completions by prompt, in the order of the file.

    Example, of four lines about three prompts, one too long: two groups, `skipped=1`.
    """

    groups: tuple[Group, ...]
    columns: tuple[str, ...]
    """Of every line, beside prompt, completion and reward: what a reward function may ask for."""
    skipped: int
    """Lines left out because prompt or completion is longer than its limit."""
    source: Path
    splitting: tuple[str, ...] = ()
    """Columns that differ between lines with the same prompt, which are several groups therefore."""

    @property
    def prompts(self) -> PromptDataset:
        """The prompts by themselves, each once."""
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

    A completion is text, or chat messages of which the last one counts. A reward is a number, or null: such a
    completion is not learned from. `section.reward_column` None leaves all of them without, to be scored.

    Raises ValueError, with file and line, for all that `load_prompts` raises it for, for a missing column, a
    completion that is empty or no text, a reward that is no finite number, and completions longer than the
    limit unless they are to be skipped.
    """
    path = Path(path)
    members: dict[tuple[Any, ...], tuple[Prompt, list[Trajectory]]] = {}
    too_long: list[str] = []
    columns: Columns | None = None
    for some, prompts in tokenized(path, tokenizer, section.prompt_column, section.image_column, processor):
        columns = columns or Columns.find(some[0], section)
        trajectories = _trajectories(some, columns, tokenizer, eos_token_id)
        for row, prompt, trajectory in zip(some, prompts, trajectories, strict=True):
            sizes = len(prompt.token_ids), len(trajectory.token_ids)
            if sizes[0] > section.max_prompt_tokens or sizes[1] > max_completion_tokens:
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
    groups = tuple(Group(prompt, tuple(those)) for prompt, those in members.values())
    names = tuple(groups[0].prompt.columns)
    return OfflineDataset(groups, names, skipped=len(too_long), source=path, splitting=_splitting(groups))


def _splitting(groups: Sequence[Group]) -> tuple[str, ...]:
    first: dict[tuple[int, ...], Prompt] = {}
    found: dict[str, None] = {}
    for prompt in (g.prompt for g in groups):
        other = first.setdefault(prompt.token_ids, prompt).columns
        found |= dict.fromkeys(name for name, value in prompt.columns.items() if other[name] != value)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a dataset are meant."""

    completion: str
    reward: str | None
    finish_reason: bool

    @classmethod
    def find(cls, row: Row, section: DataConfig) -> Columns:
        """Raises ValueError for one that is not there."""
        completion = section.completion_column
        if completion is None:
            completion = "response" if "response" in row.columns else "completion"
        wanted = {"data.completion_column": completion, "data.reward_column": section.reward_column}
        for setting, name in wanted.items():
            if name is not None and name not in row.columns:
                near = difflib.get_close_matches(name, row.columns, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                other = ", or to null to score completions" if setting == "data.reward_column" else ""
                raise ValueError(
                    f"{row.where}: no column {name!r} among {quoted(row.columns)}{hint} Set {setting}{other}"
                )
        return cls(completion, section.reward_column, FINISH_REASON in row.columns)

    def others(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        own = {self.completion, self.reward, FINISH_REASON}
        return {name: value for name, value in columns.items() if name not in own}


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
            f"{row.where}: column {column!r} must be text that is not empty, or chat messages, "
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
    """The tokens of a finished completion."""
    ids = cast(list[int], cast(Any, tokenizer)(text, add_special_tokens=False)["input_ids"])
    return (*ids, cast(int, tokenizer.eos_token_id))
