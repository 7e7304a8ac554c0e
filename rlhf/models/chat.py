"""Chat messages and plain prompts: checked and brought into one form, written by a chat template, tokenised.

Every part of a run that writes messages (prompts, image processors, reward models) does it by `write_chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf.types import Messages

Message = Mapping[str, Any]
# what the expressions of a template raise where a message is not as they expect it
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles by their names in ShareGPT's format."""
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class ChatError(ValueError):
    """Messages or tools that no prompt can be made of. The message says why; it names no place."""


def without_nulls(value: Any) -> Any:
    """The value without the keys, at any depth, that are null.

    Parquet files and `datasets` give all structs of a column the same keys: those that a row lacks are null
    there. A template that asks whether a key is there must not find it.
    """
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        return {key: without_nulls(entry) for key, entry in entries.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in cast(list[Any], value)]
    return value


def messages_of(content: object) -> Messages:
    """A prompt as a dataset gives it -> text, or a list of messages with a role and a content each.

    Messages lose their null keys; ShareGPT's `from` and `value` become role and content; a message that only
    calls tools gets an empty content. Raises ChatError, as the rest of a sentence that begins with the name
    of the column: the content is empty, or is neither text nor messages.
    """
    if isinstance(content, str):
        if not content.strip():
            raise ChatError("is empty")
        if _MESSAGES_AS_TEXT.match(content):
            raise ChatError(
                f"is text that holds chat messages, {content!r:.60}: give the list of messages itself "
                "(json.loads, or ast.literal_eval where it was written by Python's str)"
            )
        return content
    if not isinstance(content, list):
        raise ChatError(
            f"must be text or a list of chat messages, got {type(content).__name__} {content!r:.80}"
        )
    messages = messages_in(cast(list[object], content))
    if not any(_is_not_empty(message["content"]) for message in messages):
        raise ChatError("is empty")
    if messages[-1]["role"] == "assistant":
        raise ChatError(
            "ends with a message of the assistant, but the policy must write that message: remove it"
        )
    return messages


def messages_in(content: Sequence[object]) -> list[dict[str, Any]]:
    """The messages of a list in the form of `messages_of`, whoever speaks last; raises ChatError too."""
    return [_message(entry, number) for number, entry in enumerate(content)]


def _message(entry: object, number: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ChatError(f"must be a list of chat messages, but message {number} is {entry!r:.80}")
    fields: dict[str, Any] = without_nulls(entry)
    if "role" not in fields and "from" in fields:
        fields = _from_sharegpt(fields, number)
    calls: object = fields.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(c, Mapping) for c in cast(list[Any], calls)):
            raise ChatError(
                f"needs a list of objects under 'tool_calls', but message {number} has {calls!r:.80}"
            )
        fields.setdefault("content", "")
    if isinstance(fields.get("content"), list) and isinstance(fields.get("role"), str):
        _check_parts(fields["content"], number)
        return fields
    for key in ("role", "content"):
        if not isinstance(fields.get(key), str):
            found = f"{fields.get(key)!r:.80}"
            raise ChatError(f"needs text under {key!r} in each message, but message {number} has {found}")
    return fields


def _from_sharegpt(fields: Mapping[str, Any], number: int) -> dict[str, Any]:
    speaker = fields["from"]
    if speaker not in SHAREGPT:
        raise ChatError(
            f"needs a 'from' among {', '.join(SHAREGPT)} in messages of ShareGPT's format, but message "
            f"{number} has {speaker!r:.80}: write it as a message with 'role' and 'content'"
        )
    others = {key: value for key, value in fields.items() if key not in ("from", "value")}
    return {"role": SHAREGPT[speaker], "content": fields.get("value"), **others}


def _check_parts(parts: Sequence[object], number: int) -> None:
    """Raises ChatError where the content of a message is a list of anything but texts and images."""
    for part in parts:
        fields = cast(Mapping[str, object], part if isinstance(part, Mapping) else {})
        if fields.get("type") == "image":
            continue
        if fields.get("type") == "text" and isinstance(fields.get("text"), str):
            continue
        raise ChatError(
            f"has in message {number} a part {part!r:.80}, which is neither {{'type': 'text', 'text': ...}} "
            "nor {'type': 'image', 'image': ...}"
        )


def _is_not_empty(content: object) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)


def tools_of(value: object) -> list[dict[str, Any]] | None:
    """The column `tools` of a row -> a list of JSON schemas; None where there are none.

    The list may be written as JSON text, as a whole or tool by tool. Raises ChatError, as the rest of a
    sentence that begins with the name of the column.
    """
    tools = _from_json(value)
    if tools is None or tools == []:
        return None
    entries = [_from_json(tool) for tool in cast(list[object], tools)] if isinstance(tools, list) else [None]
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise ChatError(
            f"must be a list of tools (JSON schemas) for the chat template, got {value!r:.80}; if the column "
            "is not for the prompt, give it another name"
        )
    return without_nulls(entries)


def _from_json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value


def of_text(messages: Sequence[Message]) -> list[Message]:
    """Messages for a chat template that takes strings: contents made of text parts alone are joined."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if not isinstance(message["content"], str)
        and all(part.get("type") == "text" for part in message["content"])
        else message
        for message in messages
    ]


def write_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    template: Any = None,
    opens: bool = True,
) -> str:
    """The text of messages by a chat template, special tokens included.

    `template`: in place of the tokenizer's own. `opens`: the text ends with the opening of the assistant's
    turn. Raises ChatError: there is no template, it refuses the messages, or it leaves out tools or calls.
    """
    write = partial(_render, tokenizer, template_of(tokenizer, tools, template), opens)
    if any(message.get("tool_calls") for message in messages):
        text = _with_calls(messages, lambda them: write(them, tools))
    else:
        text = write(messages, tools)
    if tools and text == write(messages, None):
        raise ChatError(
            "the chat template does not write tools, so the model would not see those of the column 'tools'; "
            "take a model whose template does, or name the column otherwise if it is not for the prompt"
        )
    return text


def template_of(tokenizer: PreTrainedTokenizerBase, tools: object = None, template: Any = None) -> str:
    """The chat template for messages with or without `tools`: of several, `tool_use` or `default`.

    Raises ChatError: there is none.
    """
    found: Any = template or cast(Any, tokenizer).chat_template
    if not found:
        raise ChatError(
            "the prompt is a list of chat messages, but the tokenizer of "
            f"{cast(Any, tokenizer).name_or_path!r} has no chat template; use an instruct model, or give "
            "prompts as plain text"
        )
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in cast(list[dict[str, str]], found)}
    if isinstance(found, str):
        return found
    named = cast(dict[str, str], found)
    name = "tool_use" if tools and "tool_use" in named else "default"
    if name not in named:
        raise ChatError(
            f"the tokenizer of {cast(Any, tokenizer).name_or_path!r} has the chat templates "
            f"{', '.join(sorted(named))}, and none of them is named 'default': name the one to use so"
        )
    return named[name]


def set_variables(template: Any, variables: Mapping[str, Any]) -> Any:
    """A chat template, or several by name, in which variables are set to these values.

    Raises ChatError: a template has no variable of that name, or a value cannot be written.
    """
    if isinstance(template, Mapping):
        several = cast(Mapping[str, Any], template)
        return {name: set_variables(one, variables) for name, one in several.items()}
    if not isinstance(template, str):
        raise ChatError("data.chat_template_kwargs needs a chat template, and the tokenizer has none")
    for name in variables:
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise ChatError(
                f"data.chat_template_kwargs.{name}: the chat template reads no variable {name!r}; leave it "
                "out, or take the name that the template has"
            )
    set_to = "".join(f"{{% set {name} = {_literal(name, value)} %}}" for name, value in variables.items())
    return set_to + template


def _literal(name: str, value: Any) -> str:
    """A value as templates write it."""
    if not isinstance(value, (bool, int, float, str)):
        raise ChatError(
            f"data.chat_template_kwargs.{name} must be true, false, a number or a text, got {value!r:.80}"
        )
    return json.dumps(value, ensure_ascii=False)


def has_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the date or the time."""
    return "strftime_now" in str(cast(Any, tokenizer).chat_template)


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, opens: bool, messages: Sequence[Message], tools: Any
) -> str:
    try:
        return cast(Any, tokenizer).apply_chat_template(
            list(messages), chat_template=template, tools=tools, add_generation_prompt=opens, tokenize=False
        )
    except TEMPLATE_ERRORS as error:
        raise ChatError(f"the tokenizer's chat template refuses the prompt: {error}") from None


def _with_calls(messages: Sequence[Message], write: Callable[[Sequence[Message]], str]) -> str:
    """The text of messages of which some call tools.

    For a message without text templates expect an empty content, none, or null; a text in which the calls
    are missing is none.
    """
    problem: ChatError | None = None
    for variant in _variants(messages):
        try:
            text = write(variant)
        except ChatError as error:
            problem = problem or error
            continue
        without = [{k: v for k, v in message.items() if k != "tool_calls"} for message in variant]
        with suppress(ChatError):
            if text == write(without):
                problem = ChatError(
                    "the chat template does not write tool_calls, so the model would not see those of the "
                    "prompt; take a model whose template does, or write the calls into the content"
                )
                continue
        return text
    assert problem is not None
    raise problem


def _variants(messages: Sequence[Message]) -> Iterator[list[Message]]:
    yield list(messages)
    bare = [bool(m.get("tool_calls")) and not m["content"] for m in messages]
    if any(bare):
        kept = [{k: v for k, v in m.items() if k != "content"} for m in messages]
        yield [short if b else m for m, short, b in zip(messages, kept, bare, strict=True)]
        yield [{**m, "content": None} if b else m for m, b in zip(messages, bare, strict=True)]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, ends: bool = False, most: int | None = None
) -> list[list[int]]:
    """Token ids of plain texts, with the special tokens that the tokenizer puts before a text.

    A text that begins with them already, because a chat template wrote it, gets no second ones. Those that
    the tokenizer puts after a text (an end of sequence) are left out, unless it `ends` there. With `most`,
    longer texts lose their beginning, so that there are at most so many ids.
    """
    before, after = _special_tokens(tokenizer, texts)
    after = after if ends else []
    encoded: list[list[int]] = cast(Any, tokenizer)(texts, add_special_tokens=False)["input_ids"]
    own = [ids[len(before) :] if ids[: len(before)] == before else ids for ids in encoded]
    if most is not None:
        room = max(0, most - len(before) - len(after))
        own = [ids[max(0, len(ids) - room) :] for ids in own]
    return [[*before, *ids, *after] for ids in own]


def _special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after a text."""
    encode: Any = tokenizer
    for text in ("a", *texts[:1]):
        bare: list[int] = encode(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = encode(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1) if bare else ():
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    return [], []
