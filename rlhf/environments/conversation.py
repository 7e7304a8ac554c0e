"""`Conversation`: prompts and observations as tokens; no turn is tokenised again.

The engine's tokens of a turn stay as they are. What stands between two turns is what the chat template writes
between them; with a template like ChatML (`^` opens a message, `$` ends it, `_` is a line end):

    the policy wrote        3 * 4 = $
    the template writes     ^user_x$_^assistant_ x $_^tool_12$_^assistant_
    the observation is                             _^tool_12$_^assistant_

What a user or a tool says is text: where it spells a special token, it is tokenised in two pieces, neither of
which is that token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.environments.protocol import Message
from rlhf.models.chat import ChatError, of_text, write_chat
from rlhf.models.vision.images import ImageError
from rlhf.models.vision.processor import Processor
from rlhf.rollout.episode import Observation
from rlhf.types import Image, Images, Messages

# Unicode keeps these two for use within a program: no text has them
CUT, TURN = "\ufdd0", "\ufdd1"
THOUGHT = "\ufdd2"
TOOLS_AS_TEXT = """You can call these tools:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON between tags, once for each call:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}
</tool_call>
The results come back in the next message."""


def tools_as_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system message says of tools where the chat template does not write them."""
    return TOOLS_AS_TEXT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


class ConversationError(ValueError):
    """The chat template cannot write several turns as an engine sees them. The message says what to do."""


@dataclass(frozen=True)
class Conversation:
    """`end_token_ids`: tokens that end a turn of their own, as opposed to stop tokens of the settings."""

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]
    processor: Processor | None = None
    """That of a model that takes images, whose template is used then."""
    no_images: str = ""
    """Why observations cannot have images in this run; empty: they can, if the model takes any."""

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the chat template writes tools; if not, they are told in the system message."""
        function: dict[str, Any] = {"name": "f", "description": "", "parameters": {}}
        tool = {"type": "function", "function": function}
        try:
            self._write([_question()], [tool])
        except ChatError:
            return False
        return True

    @cached_property
    def writes_results(self) -> bool:
        """Whether the chat template writes messages of tools; if not, the user tells the results."""
        try:
            return THOUGHT in self._behind_turn([_result(THOUGHT)])
        except ChatError:
            return False

    def told_tools(self, content: Messages, tools: Sequence[Mapping[str, Any]]) -> Messages:
        """The messages of a prompt, with the tools in the system message if the template writes none."""
        if isinstance(content, str) or not tools or self.writes_tools:
            return content
        told = tools_as_text(tools)
        first, rest = dict(content[0]), list(content[1:])
        if first["role"] == "system":
            own, behind = first["content"], f"\n\n{told}"
            both = own + behind if isinstance(own, str) else [*own, *_parts(behind)]
            return [{**first, "content": both}, *rest]
        return [{"role": "system", "content": told}, first, *rest]

    def check(self, *, roles: Sequence[str]) -> None:
        """Raises ConversationError when a template does not keep what the policy wrote in earlier turns.

        `roles`: who answers the policy, `tool` or `user`.
        """
        opening = self._write([_question()])
        for role in roles:
            answer = _result("x") if role == "tool" and self.writes_results else _question()
            try:
                turn = _turn(f"<think>\n{THOUGHT}\n</think>\n\n{TURN}")
                thought = self._write([_question(), turn, answer])
                self._behind_turn([answer])
            except ChatError as error:
                raise ConversationError(
                    f"the chat template of {self._name} cannot write a conversation of several turns: {error}"
                ) from None
            if THOUGHT not in thought and "</think>" not in opening:
                raise ConversationError(
                    f"the chat template of {self._name} removes the thoughts of earlier turns when a message "
                    f"of the {answer['role']} follows, so a later turn would be sampled from another text "
                    "than the model is used with: set data.chat_template_kwargs={enable_thinking: false} if "
                    "the template has this switch, or take a model whose template only appends"
                )

    def prompt(
        self,
        content: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
        images: Sequence[Image] = (),
    ) -> tuple[int, ...]:
        """Token ids of the messages up to the opening of the policy's turn, images in their places.

        Raises ChatError and ImageError.
        """
        assert not isinstance(content, str)
        found = [dict(tool) for tool in tools] if tools else None
        return self._encode(self._write(content, found), images)

    def put_behind(self, content: Messages, messages: Sequence[Message]) -> list[Message]:
        """The prompt's messages with those of a reset behind them; a text of the user joins the user's last
        message, as in TRL. Special tokens that the new text spells are cut."""
        assert not isinstance(content, str)
        joined: list[Message] = list(content)
        for message in self._spelled(messages):
            last = joined[-1]
            both_text = isinstance(last["content"], str) and isinstance(message["content"], str)
            if message["role"] == last["role"] == "user" and both_text:
                joined[-1] = {**last, "content": last["content"] + message["content"]}
            elif message["role"] == last["role"] == "user":
                joined[-1] = {**last, "content": [*_parts(last["content"]), *_parts(message["content"])]}
            else:
                joined.append(message)
        return joined

    def observation(self, messages: Sequence[Message], last_token: int) -> Observation:
        """Tokens from behind the policy's turn, whose last token is given, to the opening of the next one.

        Raises ChatError when the template refuses the messages, and ImageError when an image cannot be read,
        or the model takes none.
        """
        messages, images = without_images(messages)
        if not self.writes_results:
            messages = [_told(message) if message["role"] == "tool" else message for message in messages]
        ids = self._encode(self._behind_turn(self._spelled(messages)), images)
        if last_token in self.end_token_ids:
            # the policy has ended its turn itself, so that the template's end is not written again
            end = next((i for i, token in enumerate(ids[:2]) if token in self.end_token_ids), -1)
            ids = ids[end + 1 :]
        return Observation(ids, images)

    def placeholders(self, token_ids: Sequence[int], start: int = 0) -> list[int]:
        """The places of the placeholders of images among tokens, the first of which is at `start`."""
        if self.processor is None:
            return []
        mark = self.processor.image_token_id
        return [place for place, token in enumerate(token_ids, start) if token == mark]

    @property
    def _name(self) -> str:
        return repr(cast(Any, self.tokenizer).name_or_path)

    def _write(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text of messages, which ends with the opening of the policy's turn."""
        if self.processor is None:
            return write_chat(self.tokenizer, of_text(messages), tools=tools)
        # a template that writes images takes contents as lists of parts
        parts = [{**message, "content": list(_parts(message["content"]))} for message in messages]
        return write_chat(self.tokenizer, parts, tools=tools, template=self.processor.chat_template)

    def _behind_turn(self, messages: Sequence[Message]) -> str:
        """What the template writes behind the content of a turn that these messages follow."""
        text = self._write([_question(), _turn(TURN), *messages])
        before, found, behind = text.rpartition(TURN)
        if not found or TURN in before:
            raise ChatError("the chat template does not write, once, what the assistant said before")
        return behind

    def _encode(self, text: str, images: Sequence[Image] = ()) -> tuple[int, ...]:
        """Token ids of a text that a template wrote, its pieces tokenised apart."""
        pieces = [piece for piece in text.split(CUT) if piece]
        if images:
            return self._with_images(pieces, images)
        encoded: list[list[int]] = cast(Any, self.tokenizer)(pieces, add_special_tokens=False)["input_ids"]
        return tuple(token for ids in encoded for token in ids)

    def _with_images(self, pieces: Sequence[str], images: Sequence[Image]) -> tuple[int, ...]:
        if self.processor is None:
            raise ImageError("it has images, but the model takes none")
        if self.no_images:
            raise ImageError(f"it has images, and {self.no_images}")
        ids: list[int] = []
        waiting = list(images)
        for piece in pieces:
            count = piece.count(self.processor.placeholder)
            own, waiting = waiting[:count], waiting[count:]
            ids += self.processor.token_ids(piece, Images("an environment's answer", tuple(own)))
        if waiting:
            raise ImageError(f"the chat template writes no place for {len(waiting)} of its images")
        return tuple(ids)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches what would be read as a token of its own: special tokens, and those that were added."""
        added: Any = cast(Any, self.tokenizer).added_tokens_decoder
        names = sorted({str(token) for token in added.values()}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _spelled(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in whose texts special tokens are cut behind their first character."""

        def spelled(text: str) -> str:
            clean = re.sub(f"[{CUT}{TURN}{THOUGHT}]", "\ufffd", text)
            return self._special.sub(lambda found: f"{found[0][0]}{CUT}{found[0][1:]}", clean)

        def of_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**part, "text": spelled(part["text"])} if part.get("type") == "text" else part

        return [
            {**m, "content": spelled(m["content"])}
            if isinstance(m["content"], str)
            else {**m, "content": [of_part(part) for part in m["content"]]}
            for m in messages
        ]


def without_images(messages: Sequence[Message]) -> tuple[list[Message], tuple[Image, ...]]:
    """The messages with `{"type": "image"}` for images, and the images."""
    found: list[Image] = []
    written: list[Message] = []
    for message in messages:
        content: Any = message["content"]
        if not isinstance(content, str):
            found += [part["image"] for part in content if part["type"] == "image" and "image" in part]
            content = [{"type": "image"} if part["type"] == "image" else part for part in content]
        written.append({**message, "content": content})
    return written, tuple(found)


def without_cuts(messages: Sequence[Message]) -> list[Message]:
    """Messages of `put_behind` as people read them."""
    return [
        {**m, "content": m["content"].replace(CUT, "")} if isinstance(m["content"], str) else m
        for m in messages
    ]


def _parts(content: object) -> Sequence[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else cast(Sequence[Any], content)


def _question() -> Message:
    return {"role": "user", "content": "x"}


def _turn(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _result(content: str) -> Message:
    return {"role": "tool", "name": "f", "content": content}


def _told(message: Message) -> Message:
    """The result of a tool as the user tells it."""
    content = message["content"]
    if isinstance(content, str):
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    return {"role": "user", "content": content}
