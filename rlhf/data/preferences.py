"""Which completions a line of a dataset has, by its columns: pairs, labels, lists, one completion, chats.

    {"prompt": ..., "chosen": ..., "rejected": ...}            a pair; `probability` beside it is a soft label
    {"chosen": ..., "rejected": ...}                           a pair whose common beginning is the prompt
    {"prompt": ..., "completion": ..., "label": true}          a completion that is good or bad by itself
    {"prompt": ..., "completions": [...], "rewards": [...]}    several completions
    {"prompt": ..., "completion": ..., "reward": 0.8}          one; lines with one prompt are one group
    {"messages": [...]}                                        a chat

One completion or chat has the reward 1 where no column has one.

Text or chat messages everywhere, as TRL has them; `rlhf/data/pair_prompts.py` finds the prompt of a pair.
Difference from TRL: a pair whose two completions are the same is left out, and counted.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rlhf.config.data import DataConfig
from rlhf.data.chats import chats_column, is_chat, join_prompt, split_messages
from rlhf.data.pair_prompts import with_prompt
from rlhf.data.rows import Row, quoted
from rlhf.models.chat import ChatError, Message, messages_in, of_text
from rlhf.types import Duel

FINISH_REASON = "finish_reason"
PROBABILITY = "probability"
BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message under which some formats have what the assistant wrote beside its content."""
ADVICE = "give the last message of the assistant alone in it, and the messages before it in the prompt"


@dataclass(frozen=True, slots=True)
class Line:
    """The completions of one line."""

    texts: tuple[str, ...]
    rewards: tuple[float | None, ...]
    duels: tuple[Duel, ...] = ()
    chat: tuple[Message, ...] | None = None
    """The messages of a chat, prompt included, in place of a text (rlhf/data/chats.py)."""
    says_nothing: bool = False
    """Whether it is a pair of the same completion twice."""


@dataclass(frozen=True, slots=True)
class Format:
    """How the lines of a dataset are read; found once, from the columns of the first line."""

    read: Callable[[Row], Line]
    taken: frozenset[str]
    """Columns that are read here, so that reward functions do not get them."""
    merges: bool = False
    """Whether lines with the same prompt form one group. Else each line is a group."""
    prompt: Callable[[Row], Row] = lambda row: row
    """Puts the prompt into its column, where it is a part of the completions or of a chat."""
    imitates: bool = False
    """Whether no column has a reward, so that each completion has the reward 1."""

    def others(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that are not read here."""
        return {name: value for name, value in columns.items() if name not in self.taken}


def find_format(row: Row, section: DataConfig) -> Format:
    """The format of a dataset with this first line; the settings name the columns of completion and reward.

    Raises ValueError: a column is missing.
    """
    columns, where = list(row.columns), row.where
    there = set(columns)
    scored = section.reward_column is None
    if "chosen" in there or "rejected" in there:
        _require(columns, ("chosen", "rejected"), where, "a pair")
        read = _Pairs(PROBABILITY in there, scored)
        taken = frozenset({"chosen", "rejected", PROBABILITY, FINISH_REASON})
        return Format(read, taken, prompt=partial(with_prompt, column=section.prompt_column))
    if "completions" in there and section.completion_column is None:
        wanted = ("completions",) if scored else ("completions", "rewards")
        _require(columns, wanted, where, "a list of completions")
        taken = frozenset({"completions", "rewards", FINISH_REASON})
        return Format(_Lists(scored), taken)
    completion = section.completion_column
    if completion is None:
        completion = "response" if "response" in there else "completion"
    chats = chats_column(columns, section.prompt_column)
    if chats is not None and completion not in there:
        return _chats(row, section, chats)
    # where reward functions score the completions, `label` is a column for them, for example the answer
    if "label" in there and not scored and section.reward_column not in there:
        _require(columns, (completion,), where, "a labelled completion")
        return Format(_Singles(completion), frozenset({completion, "label", FINISH_REASON}))
    require_named(row, "completion_column", completion)
    reward = _Reward.of(row, section)
    return Format(
        _One(section.prompt_column, completion, reward),
        frozenset({completion, FINISH_REASON, reward.column or completion}),
        merges=True,
        prompt=partial(join_prompt, prompt_column=section.prompt_column, completion=completion),
        imitates=reward.otherwise is not None,
    )


def _chats(row: Row, section: DataConfig, column: str) -> Format:
    reward = _Reward.of(row, section)
    return Format(
        lambda row: Line((), (reward(row),), chat=tuple(row.columns[column])),
        frozenset({column, FINISH_REASON, reward.column or column}),
        prompt=partial(split_messages, prompt_column=section.prompt_column, column=column),
        imitates=reward.otherwise is not None,
    )


@dataclass(frozen=True, slots=True)
class _Reward:
    """The reward of a line: that of a column, or the same for all."""

    column: str | None
    otherwise: float | None = None

    @classmethod
    def of(cls, row: Row, section: DataConfig) -> _Reward:
        name = section.reward_column
        if name == DataConfig.model_fields["reward_column"].default and name not in row.columns:
            return cls(None, 1.0)
        if name is not None:
            require_named(row, "reward_column", name)
        return cls(name)

    def __call__(self, row: Row) -> float | None:
        return self.otherwise if self.column is None else _number(row, self.column, row.columns[self.column])


def require_named(row: Row, setting: str, name: str) -> None:
    """Raises ValueError: there is no column `name`, which a setting of the section `data` gives."""
    if name in row.columns:
        return
    near = difflib.get_close_matches(name, row.columns, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    other = ", or to null to have the completions scored" if setting == "reward_column" else ""
    raise ValueError(
        f"{row.where}: no column {name!r} among {quoted(row.columns)}{hint} Set data.{setting} to its "
        f"name{other}. Or give pairs (chosen, rejected), labels (completion, label), lists "
        "(completions, rewards) or chats (messages)"
    )


def _require(columns: Sequence[str], wanted: Sequence[str], where: str, what: str) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"{where}: {what} needs the columns {quoted(wanted)}, and there is no {quoted(missing)} among "
            f"{quoted(columns)}"
        )


@dataclass(frozen=True, slots=True)
class _Pairs:
    soft: bool
    scored: bool

    def __call__(self, row: Row) -> Line:
        texts = tuple(_column_text(row, name) for name in ("chosen", "rejected"))
        duels = (Duel(0, 1, _probability(row)),) if self.soft else ()
        rewards = (None, None) if self.scored else (1.0, 0.0)
        return Line(texts, rewards, duels, says_nothing=texts[0] == texts[1])


@dataclass(frozen=True, slots=True)
class _Singles:
    completion: str

    def __call__(self, row: Row) -> Line:
        label: object = row.columns["label"]
        if not (isinstance(label, bool) or label in (0, 1)):
            raise ValueError(f"{row.where}: column 'label' must be true or false, got {label!r:.80}")
        return Line((_column_text(row, self.completion),), (float(bool(label)),))


@dataclass(frozen=True, slots=True)
class _Lists:
    scored: bool

    def __call__(self, row: Row) -> Line:
        given: object = row.columns["completions"]
        if not isinstance(given, list) or not given:
            raise ValueError(
                f"{row.where}: column 'completions' must be a list of completions, got {given!r:.80}"
            )
        several = cast(list[object], given)
        texts = tuple(completion_text(row.where, "completions", value) for value in several)
        if self.scored:
            return Line(texts, (None,) * len(texts))
        rewards: object = row.columns["rewards"]
        if not isinstance(rewards, list) or len(cast(list[object], rewards)) != len(texts):
            raise ValueError(
                f"{row.where}: column 'rewards' must be a list of {len(texts)} numbers, one for each "
                f"completion, got {rewards!r:.80}"
            )
        return Line(texts, tuple(_number(row, "rewards", value) for value in cast(list[object], rewards)))


@dataclass(frozen=True, slots=True)
class _One:
    prompt: str
    completion: str
    reward: _Reward

    def __call__(self, row: Row) -> Line:
        given: object = row.columns[self.completion]
        if is_chat(given):
            chat = (*row.columns[self.prompt], *cast(list[Message], given))
            return Line((), (self.reward(row),), chat=chat)
        return Line((_column_text(row, self.completion),), (self.reward(row),))


def _column_text(row: Row, column: str) -> str:
    return completion_text(row.where, column, row.columns[column])


def completion_text(where: str, column: str, value: object) -> str:
    """The text of a completion: text as it is, or the content of a single assistant message.

    Raises ValueError, which begins with `where`: it is neither, there are several messages, or the message
    has more than its content.
    """
    text = value
    if value and isinstance(value, list | Mapping):
        text = _content(where, column, cast(list[object], value if isinstance(value, list) else [value]))
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"{where}: column {column!r} must be non-empty text or one chat message, got {value!r:.80}"
        )
    return text


def _content(where: str, column: str, given: list[object]) -> object:
    try:
        messages = of_text(messages_in(given))
    except ChatError as error:
        raise ValueError(f"{where}: column {column!r} {error}") from None
    if len(messages) > 1:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{where}: column {column!r} must hold one message of the assistant, got {len(messages)} "
            f"({roles}); {ADVICE}"
        )
    [message] = messages
    if message["role"] != "assistant":
        raise ValueError(
            f"{where}: the message in column {column!r} must be the assistant's, but its role is "
            f"{message['role']!r}"
        )
    if beside := [key for key in BESIDE_CONTENT if message.get(key)]:
        raise ValueError(
            f"{where}: the message in column {column!r} has {quoted(beside)}, and only its content would be "
            "learned from; write all that the model is to write into the content"
        )
    return message["content"]


def _probability(row: Row) -> float:
    value: object = row.columns[PROBABILITY]
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"{row.where}: column {PROBABILITY!r} must be a number from 0 to 1, the probability that chosen "
            f"is better than rejected, got {value!r:.80}"
        )
    return float(value)


def _number(row: Row, column: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{row.where}: column {column!r} must be a finite number or null, got {value!r:.80}")
    return float(value)
