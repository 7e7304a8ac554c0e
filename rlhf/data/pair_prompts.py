"""The prompt of a preference pair: in a column of its own, or what chosen and rejected both begin with.

Difference from TRL: the common beginning of two texts is cut back to the last white space, so that no word is
split ("it is bl|ue", "it is bl|ack"). As in TRL, a blank before the answers belongs to them: many tokenizers
make one token of a blank and the word behind it, and so the tokens are those of the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, cast

from rlhf.data.rows import Row
from rlhf.models.chat import ChatError, Message, messages_in, of_text

SIDES = ("chosen", "rejected")


def with_prompt(row: Row, column: str) -> Row:
    """The row with its prompt in `column` and the answers alone in chosen and rejected.

    A prompt that stands in both is taken from there: it is their longest common list of leading messages, or
    their longest common beginning. If `column` has a prompt beside whole chats, the two must agree; a longer
    one in `column` (with a system message, for example) is kept.

    Raises ValueError, with file and line: there is no prompt, or there are two that differ.
    """
    if not set(SIDES) <= row.columns.keys():
        return row
    given = row.columns.get(column)
    sides: list[Any] = [_messages(row, name) for name in SIDES]
    chosen, rejected = sides
    chats = all(isinstance(side, list) for side in sides)
    if given is not None and not (chats and all(map(_is_whole, sides))):
        return row
    if chats:
        start: Any = _common_messages(chosen, rejected)
    elif all(isinstance(side, str) for side in sides):
        start = _common_text(chosen, rejected)
    else:
        raise ValueError(
            f"{row.where}: there is no prompt in a column {column!r}, and it cannot be told from chosen, "
            f"which is {_kind(chosen)}, and rejected, which is {_kind(rejected)}; give both as text or both "
            "as chat messages, or the prompt in a column of its own (data.prompt_column names it)"
        )
    if not start:
        raise ValueError(
            f"{row.where}: chosen and rejected do not begin alike, so that the prompt cannot be told from "
            f"the completions; give it in a column {column!r} (data.prompt_column names it), and the "
            "answers alone in chosen and rejected"
        )
    prompt = start if given is None else _agreed(row, column, given, start)
    answers = {name: side[len(start) :] for name, side in zip(SIDES, sides, strict=True)}
    return replace(row, columns={**row.columns, column: prompt, **answers})


def _messages(row: Row, column: str) -> Any:
    """A column's messages, contents without images as one text each; a value of another kind as it is."""
    value: Any = row.columns[column]
    if not isinstance(value, list):
        return value
    try:
        return of_text(messages_in(cast(list[object], value)))
    except ChatError as error:
        raise ValueError(f"{row.where}: column {column!r} {error}") from None


def _is_whole(messages: Sequence[Message]) -> bool:
    """Whether they are a prompt and an answer, not the answer alone."""
    return len(messages) > 1 and messages[0]["role"] != "assistant"


def _kind(value: object) -> str:
    return (
        "chat messages" if isinstance(value, list) else "text" if isinstance(value, str) else f"{value!r:.60}"
    )


def _common_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that both begin with; at least one is left for each completion."""
    most = max(0, min(len(chosen), len(rejected)) - 1)
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return chosen[:same]


def _common_text(chosen: str, rejected: str) -> str:
    """The text that both begin with, cut back to the last white space; the completions keep some text."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen.rstrip(), rejected.rstrip(), strict=False))
    common = "".join(character for character, _ in alike)
    end = max((i + 1 for i, character in enumerate(common) if character.isspace()), default=0)
    return common[:end].removesuffix(" ")


def _agreed(row: Row, column: str, given: object, start: list[Message]) -> object:
    """The longer of the prompt that a column gives and the one that both chats begin with.

    A text agrees if it is within a message, or has the last message within it. Raises ValueError where they
    differ.
    """
    if isinstance(given, list):
        listed: list[Message] = _messages(row, column)
        if listed[-len(start) :] == start:
            return listed
        if listed in (start[: len(listed)], start[-len(listed) :]):
            return start
    else:
        text = " ".join(str(given).split())
        contents = [" ".join(_words(message).split()) for message in start]
        if any(text in content for content in contents) or contents[-1] in text:
            return start
    raise ValueError(
        f"{row.where}: column {column!r} has another prompt, {given!r:.80}, than chosen and rejected begin "
        f"with, {start!r:.80}; remove the column, or give the answers alone in chosen and rejected"
    )


def _words(message: Message) -> str:
    """The text of a message, without its images."""
    content: Any = message["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
