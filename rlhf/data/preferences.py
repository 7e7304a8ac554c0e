"""Which completions a line of a dataset has, by its columns: pairs, labels, lists, one completion, chats.

    {"prompt": ..., "chosen": ..., "rejected": ...}            a pair; `probability` beside it is a soft label
    {"chosen": ..., "rejected": ...}                           a pair whose common beginning is the prompt
    {"prompt": ..., "completion": ..., "label": true}          a completion that is good or bad by itself
    {"prompt": ..., "completions": [...], "rewards": [...]}    several completions
    {"prompt": ..., "completion": ..., "reward": 0.8}          one; lines with one prompt are one group
    {"messages": [...]}                                        a chat; its reward is 1 where no column has it

Text or chat messages everywhere, as TRL has them. Differences from TRL: 1. the common beginning of two texts
is cut back to the last white space, so that no word is split (TRL cuts back a single blank at its end); 2. a
pair whose two completions are the same is left out, and counted.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, cast

from rlhf.config.data import DataConfig
from rlhf.data.chats import MESSAGES, is_chat, join_prompt, split_messages
from rlhf.data.rows import Row, quoted
from rlhf.models.chat import Message
from rlhf.types import Duel

FINISH_REASON = "finish_reason"
PROBABILITY = "probability"
ADVICE = "give the last message of the assistant alone in it, and the messages before it in the prompt"


@dataclass(frozen=True, slots=True)
class Line:
    """The completions of one line."""

    texts: tuple[str, ...]
    rewards: tuple[float | None, ...]
    duels: tuple[Duel, ...] = ()
    chat: tuple[Message, ...] | None = None
    """The messages of a chat, prompt included, in place of a text (rlhf/data/chats.py)."""

    @property
    def says_nothing(self) -> bool:
        """Whether it is a pair of the same completion twice."""
        return len(self.texts) == 2 and self.texts[0] == self.texts[1]


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
    """Whether no column has a reward, so that each chat has the reward 1."""

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
    if MESSAGES in there and completion not in there and section.prompt_column != MESSAGES:
        return _chats(row, section)
    if "label" in there and section.reward_column not in there:
        _require(columns, (completion,), where, "a labelled completion")
        return Format(_Singles(completion, scored), frozenset({completion, "label", FINISH_REASON}))
    _require_named(row, "completion_column", completion)
    reward = _Reward.of(row, section, is_chat(row.columns[completion]))
    return Format(
        _One(section.prompt_column, completion, reward),
        frozenset({completion, FINISH_REASON, reward.column or completion}),
        merges=True,
        prompt=partial(join_prompt, prompt_column=section.prompt_column, completion=completion),
        imitates=reward.otherwise is not None,
    )


def _chats(row: Row, section: DataConfig) -> Format:
    reward = _Reward.of(row, section, True)
    return Format(
        lambda row: Line((), (reward(row),), chat=tuple(row.columns[MESSAGES])),
        frozenset({MESSAGES, FINISH_REASON, reward.column or MESSAGES}),
        prompt=partial(split_messages, prompt_column=section.prompt_column),
        imitates=reward.otherwise is not None,
    )


@dataclass(frozen=True, slots=True)
class _Reward:
    """The reward of a line: that of a column, or the same for all."""

    column: str | None
    otherwise: float | None = None

    @classmethod
    def of(cls, row: Row, section: DataConfig, chat: bool) -> _Reward:
        name = section.reward_column
        if chat and name == DataConfig.model_fields["reward_column"].default and name not in row.columns:
            return cls(None, 1.0)
        if name is not None:
            _require_named(row, "reward_column", name)
        return cls(name)

    def __call__(self, row: Row) -> float | None:
        return self.otherwise if self.column is None else _number(row, self.column, row.columns[self.column])


def _require_named(row: Row, setting: str, name: str) -> None:
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
        return Line(texts, (None, None) if self.scored else (1.0, 0.0), duels)


@dataclass(frozen=True, slots=True)
class _Singles:
    completion: str
    scored: bool

    def __call__(self, row: Row) -> Line:
        label: object = row.columns["label"]
        if not (isinstance(label, bool) or label in (0, 1)):
            raise ValueError(f"{row.where}: column 'label' must be true or false, got {label!r:.80}")
        return Line((_column_text(row, self.completion),), (None if self.scored else float(bool(label)),))


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

    Raises ValueError, which begins with `where`: it is neither, or there are several messages.
    """
    text = value
    if isinstance(value, list) and value and all(isinstance(m, Mapping) for m in cast(list[object], value)):
        messages = cast(list[Mapping[str, object]], value)
        if len(messages) > 1:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"{where}: column {column!r} must hold one message of the assistant, got {len(messages)} "
                f"({roles}); {ADVICE}"
            )
        role, text = messages[0].get("role"), _joined(messages[0].get("content"))
        if role != "assistant":
            raise ValueError(
                f"{where}: the message in column {column!r} must be the assistant's, but its role is {role!r}"
            )
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"{where}: column {column!r} must be non-empty text or one chat message, got {value!r:.80}"
        )
    return text


def _joined(content: object) -> object:
    """The content of a message whose parts are all text as one text; any other as it is."""
    if not isinstance(content, list):
        return content
    parts = cast(list[object], content)
    texts = [cast(Any, part).get("text") for part in parts if isinstance(part, Mapping)]
    whole = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else parts


def with_prompt(row: Row, column: str) -> Row:
    """The row with its prompt in `column` and the answers alone in chosen and rejected.

    A prompt that stands in both completions is taken from there: it is their longest common list of leading
    messages, or their longest common beginning, cut back to the last white space.
    """
    if not {"chosen", "rejected"} <= row.columns.keys():
        return row
    sides = row.columns["chosen"], row.columns["rejected"]
    as_messages = all(isinstance(side, list) for side in sides)
    if column in row.columns and not (as_messages and all(len(side) > 1 for side in sides)):
        return row
    if as_messages:
        prompt: Any = _common_messages(*sides)
    elif all(isinstance(side, str) for side in sides):
        prompt = _common_text(*sides)
    else:
        return row
    if not prompt:
        raise ValueError(
            f"{row.where}: there is no column {column!r}, and chosen and rejected do not begin alike: the "
            "prompt cannot be told from the completions; give it a column of its own"
        )
    chosen, rejected = (side[len(prompt) :] for side in sides)
    return replace(row, columns={**row.columns, column: prompt, "chosen": chosen, "rejected": rejected})


def _common_messages(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """The messages that both begin with; at least one is left for each completion."""
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return chosen[:same]


def _common_text(chosen: str, rejected: str) -> str:
    """The text that both begin with, up to and with the last white space; the completions keep some text."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen.rstrip(), rejected.rstrip(), strict=False))
    common = "".join(character for character, _ in alike)
    return common[: max((i + 1 for i, character in enumerate(common) if character.isspace()), default=0)]


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
