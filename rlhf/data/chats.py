"""Chats of several turns: every message of the assistant is learned from.

    {"messages": [system?, user, assistant, user, assistant, ...]}      or "conversations", "conversation"
    {"prompt": ..., "completion": [assistant, user, assistant, ...]}

The messages before the assistant's first one, and the opening of its turn, are the prompt. All that follows,
up to the assistant's last message, is one trajectory; here of two turns, with a template like ChatML (`^`
opens a message, `$` ends it, `_` is a line end):

    prompt      ^user_Three?$_^assistant_
    trajectory  yes$ _^user_Four?$_^assistant_ no$
    loss_mask   1111 0000000000000000000000000 111
    turns       0000 1111111111111111111111111 111

Where the assistant's words begin and end in the text is told by the template's `{% generation %}` marks if it
has them, else by what the template writes of the first k messages, which must be the beginning of what it
writes of the whole chat. The text is cut at these places, and the pieces are tokenised apart and joined. A
turn ends with the end-of-sequence token that the template writes; a line end behind it is not learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Row
from rlhf.models.chat import ChatError, Message, messages_in, of_text, template_of, tools_of, write_chat
from rlhf.models.pretrained import decoded
from rlhf.types import FinishReason, Source, Trajectory

CHATS = ("messages", "conversations", "conversation")
"""Names of a column of whole chats; the last two are those of ShareGPT's format."""
TOOLS = "tools"
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Unicode keeps these two for use within a program: no text has them
OPENS, CLOSES = "\ufdd0", "\ufdd1"


def is_chat(value: object) -> bool:
    """Whether a completion is a list of several messages."""
    return isinstance(value, list) and len(cast(list[object], value)) > 1


def chats_column(columns: Iterable[str], prompt_column: str) -> str | None:
    """The column of whole chats, if there is one and it is not that of the prompts."""
    return next((name for name in CHATS if name in columns and name != prompt_column), None)


def split_messages(row: Row, prompt_column: str, column: str) -> Row:
    """The row with the messages before the assistant's first one as its prompt; those after its last one are
    dropped from the chat in `column`.

    Raises ValueError, with file and line: they are no messages, the assistant writes none, or the first one.
    """
    messages = _checked(row, column)
    first = _first(row, column, messages)
    if first == 0:
        raise ValueError(
            f"{row.where}: column {column!r} begins with a message of the assistant, and there is no "
            "prompt to write it for; put a message of the user before it"
        )
    return replace(row, columns={**row.columns, prompt_column: messages[:first], column: messages})


def prompt_of_chat(row: Row, prompt_column: str, column: str) -> Row:
    """The row with a prompt to sample from: the whole chat where it does not end with the assistant, else as
    `split_messages` has it. Raises ValueError as that does."""
    messages = _checked(row, column)
    if messages[-1]["role"] == "assistant":
        return split_messages(row, prompt_column, column)
    return replace(row, columns={**row.columns, prompt_column: messages})


def join_prompt(row: Row, prompt_column: str, completion: str) -> Row:
    """A row whose completion is a chat, in the form of `split_messages`; a prompt of text is the user's first
    message. Any other row as it is.

    Raises ValueError, with file and line: as in `split_messages`, or the first message is another's.
    """
    if not is_chat(row.columns.get(completion)) or not row.columns.get(prompt_column):
        return row
    messages = _checked(row, completion)
    if _first(row, completion, messages) != 0:
        raise ValueError(
            f"{row.where}: column {completion!r} must begin with a message of the assistant, but its first "
            f"role is {messages[0]['role']!r}; put the messages before it into the prompt, or the whole chat "
            f"into a column {CHATS[0]!r} in place of prompt and completion"
        )
    prompt = row.columns[prompt_column]
    before = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(row, prompt_column)
    )
    return replace(row, columns={**row.columns, prompt_column: before, completion: messages})


def _first(row: Row, column: str, messages: list[Message]) -> int:
    """The place of the assistant's first message; those after its last one are removed from the list."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise ValueError(f"{row.where}: column {column!r} has no message of the assistant to learn from")
    del messages[places[-1] + 1 :]
    return places[0]


def _checked(row: Row, column: str) -> list[Message]:
    """The messages of a column in the form that templates take, each content as one text."""
    value: object = row.columns[column]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{row.where}: column {column!r} must be a list of chat messages, got {value!r:.80}")
    try:
        messages = of_text(messages_in(cast(list[object], value)))
    except ChatError as error:
        raise ValueError(f"{row.where}: column {column!r} {error}") from None
    for number, message in enumerate(messages):
        place = f"{row.where}: column {column!r}, message {number}"
        if not isinstance(message["content"], str):
            raise ValueError(f"{place} has an image, and whole chats are of text alone")
        if (
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
        ):
            raise ValueError(f"{place} is the assistant's and empty: there is nothing to learn from it")
    return messages


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """Makes trajectories of chats."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_id: int
    """Appended to a chat whose template writes no end of the assistant's turn."""
    end_token_ids: frozenset[int]
    """All tokens that end a turn; `eos_token_id` is among them."""
    takes_images: bool = False
    """Whether a processor writes the prompts, not the tokenizer."""

    def trajectory(
        self, row: Row, messages: Sequence[Message], reward: float | None, reason: FinishReason
    ) -> Trajectory:
        """What follows the prompt in a chat of this line; the last message is the assistant's.

        With `FinishReason.LENGTH` the last message was cut, so that it has no end. Raises ValueError, with
        file and line: the chat template refuses the chat, or does not show what the assistant wrote; or the
        model takes images.
        """
        try:
            text, start, spans = self._places(messages, tools_of(row.columns.get(TOOLS)))
        except ChatError as error:
            raise ValueError(f"{row.where}: {error}") from None
        starts = [*(begin for begin, _ in spans[1:]), len(text)]
        pieces = [text[start : spans[0][0]]]
        for (begin, end), following in zip(spans, starts, strict=True):
            pieces += [text[begin:end], text[end:following]]
        first, *encoded = cast(
            list[list[int]], cast(Any, self.tokenizer)(pieces, add_special_tokens=False)["input_ids"]
        )
        ids, mask, turns = [*first], [False] * len(first), [0] * len(first)
        for turn, (own, following) in enumerate(zip(encoded[::2], encoded[1::2], strict=True)):
            stop, ended = self._stop(own, following)
            both = own + following
            if turn == len(spans) - 1:
                both = both[:stop]
                if ended and reason == FinishReason.LENGTH:
                    both.pop()
                elif not ended and reason == FinishReason.STOP:
                    both.append(self.eos_token_id)
                stop = len(both)
            ids += both
            mask += [place < stop for place in range(len(both))]
            turns += [turn + (place >= stop) for place in range(len(both))]
        return Trajectory(
            tuple(ids),
            tuple(mask),
            tuple(turns),
            rollout_logprobs=None,
            finish_reason=reason,
            versions=(),
            text=decoded(self.tokenizer, ids),
            reward=reward,
            source=Source.DATA,
        )

    def _stop(self, own: list[int], following: list[int]) -> tuple[int, bool]:
        """How many tokens of a turn the assistant chose, its end included, and whether it has an end.

        A template may write the end within the assistant's words or its marks, or right behind them.
        """
        ends = [place for place, token in enumerate(own) if token in self.end_token_ids]
        if ends:
            return ends[-1] + 1, True
        if following and following[0] in self.end_token_ids:
            return len(own) + 1, True
        return len(own), False

    def _places(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[str, int, list[tuple[int, int]]]:
        """The text of the whole chat, where its prompt ends, and where the assistant's words are in it.

        Raises ChatError as `trajectory` raises ValueError.
        """
        if self.takes_images:
            raise ChatError(
                "the model takes images, and whole chats are for models of text alone; write a line for each "
                "turn, with the earlier turns in the prompt and one message as the completion"
            )
        text = write_chat(self.tokenizer, messages, tools=tools, opens=False)

        def end_of(count: int, opens: bool = False) -> int:
            written = write_chat(self.tokenizer, messages[:count], tools=tools, opens=opens)
            if not text.startswith(written):
                raise ChatError(_NOT_APPENDED.format(count=count))
            return len(written)

        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        prompt = end_of(turns[0], opens=True)
        template = template_of(self.tokenizer, tools)
        if not GENERATION.search(template):
            return text, prompt, [(end_of(turn, opens=True), end_of(turn + 1)) for turn in turns]
        marked = write_chat(self.tokenizer, messages, tools=tools, template=_visible(template), opens=False)
        spans = [(max(begin, prompt), end) for begin, end in _marks(marked) if end > prompt]
        if marked.replace(OPENS, "").replace(CLOSES, "") != text or not spans:
            raise ChatError(
                "the {% generation %} marks of the chat template do not show what the assistant says in this "
                "chat; put them around the content of each of its messages, or remove them"
            )
        return text, prompt, spans


_NOT_APPENDED = (
    "the chat template does not write the first {count} messages of this chat as it writes them within the "
    "whole chat (a template may leave out earlier thoughts), so that it cannot be told which tokens the "
    "assistant wrote. Give the tokenizer a chat template that only appends, or one with {{% generation %}} "
    "marks around the assistant's content; or write a line for each turn, with the earlier turns in the "
    "prompt and one message as the completion"
)


def _visible(template: str) -> str:
    """The template with a character in the place of each mark, and its control of white space."""
    return GENERATION.sub(
        lambda mark: f"{{%{mark[1]} if true %}}{CLOSES if mark[2] else OPENS}{{% endif {mark[3]}%}}", template
    )


def _marks(text: str) -> list[tuple[int, int]]:
    """The places between the characters of `_visible`, counted without these characters."""
    spans: list[tuple[int, int]] = []
    place = begin = 0
    for part in re.split(f"([{OPENS}{CLOSES}])", text):
        if part == OPENS:
            begin = place
        elif part == CLOSES:
            spans.append((begin, place))
        else:
            place += len(part)
    return spans
