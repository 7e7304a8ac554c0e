"""Finds the calls of tools in what the policy wrote: formats `json_tags` and `python`, or a user's function.

    json_tags:  <tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>     one tag a call
    python:     [multiply(a=6, b=7), add(a=1, b=2)]                                            literals only

These are the formats of vLLM's parsers `hermes` and `pythonic`. What differs from vLLM:
1. A call that cannot be read is not taken for text: the policy is told why.
2. What stands between `<think>` and `</think>` is no call, even if it quotes one. vLLM removes it with a
   parser of its own (`--reasoning-parser`) before it looks for calls; verl's parser does not, and would carry
   the quoted call out. Text before a lone `</think>` is thought too, because many chat templates put
   `<think>` into the prompt; a thought that does not end has no call.
3. `python` is read where a line begins with `[name(`; vLLM expects it at the very beginning.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rlhf.plugins import load_plugin

OPENED, CLOSED = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"
FIRST = re.compile(f"{THINK}|{OPENED}")
LIST_OF_CALLS = re.compile(r"^[ \t]*(?=\[\s*[A-Za-z_]\w*\s*\()", re.MULTILINE)
NOT_JSON = (TypeError, ValueError, RecursionError)
NOT_PYTHON = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
MOST_ENDS = 50
"""Places at which a list of calls may end that are tried; each costs a pass of Python's parser."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the policy wrote it; neither the name nor the arguments are checked."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Malformed:
    """A call that cannot be read, and why, in words for the policy."""

    reason: str
    name: str = ""
    """The name of the tool, if that much can be read."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A turn of the policy: what it said beside the calls that can be read, and all calls in their order."""

    content: str
    calls: tuple[Call | Malformed, ...] = ()


Parser = Callable[[str], Parsed]


def parser_of(calls: str) -> Parser:
    """The parser that `environment.calls` names. Raises ValueError when it names none."""
    if calls in FORMATS:
        return FORMATS[calls]
    if ":" not in calls:
        raise ValueError(
            f"environment.calls must be one of {', '.join(FORMATS)}, or my.py:function, got {calls!r}"
        )
    found = load_plugin(calls)
    if not callable(found):
        raise ValueError(f"environment.calls: {calls} must be a function from a text to a list of calls")
    return partial(_by_function, calls, cast(Callable[[str], Any], found))


def json_tags(text: str) -> Parsed:
    """Calls in `<tool_call>` tags. The last may lack its closing tag, if it is complete otherwise."""
    position = _after_prompted_thought(text)
    said, calls, told = "", list[Call | Malformed](), 0
    while (found := FIRST.search(text, position)) is not None:
        if found.group() == THINK:
            end = text.find(THOUGHT, found.end())
            if end < 0:
                break
            position = end + len(THOUGHT)
            continue
        call, position = _in_tag(text, found.end())
        calls.append(call)
        if isinstance(call, Call):
            said, told = said + text[told : found.start()], position
    return Parsed((said + text[told:]).strip(), tuple(calls))


def python(text: str) -> Parsed:
    """Calls in a list of Python. Their arguments are named, and literals that JSON can hold."""
    outside = _without_thoughts(text)
    found = LIST_OF_CALLS.search(outside)
    if found is None:
        return Parsed(text)
    start = found.end()
    ends = [place.end() for place in re.finditer(r"\]", outside[start:])][-MOST_ENDS:]
    reason = "the list of calls has no closing ]"
    for end in reversed(ends):
        try:
            parsed = ast.parse(outside[start : start + end], mode="eval").body
        except NOT_PYTHON as error:
            reason = f"the list of calls is not Python: {_short(error)}"
            continue
        if isinstance(parsed, ast.List):
            content = text.replace(outside[start : start + end], "", 1).strip()
            return Parsed(content, tuple(_of_python(node) for node in parsed.elts))
    return Parsed(text, (Malformed(reason),))


FORMATS: Mapping[str, Parser] = {"json_tags": json_tags, "python": python}


def _in_tag(text: str, start: int) -> tuple[Call | Malformed, int]:
    """The call behind the opening tag that ends at `start`, and the place behind its closing tag."""
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    try:
        # a closing tag within a text of the arguments does not end the call
        value, end = DECODER.raw_decode(text, begin)
    except NOT_JSON as error:
        closed = text.find(CLOSED, start)
        end = len(text) if closed < 0 else closed + len(CLOSED)
        return Malformed(f"the call is not JSON: {_short(error)}"), end
    rest = text[end:]
    closed = rest.find(CLOSED)
    if closed >= 0 and not rest[:closed].strip():
        end += closed + len(CLOSED)
    elif rest.strip() and closed >= 0:
        return Malformed("there is more than one JSON object in the call"), end + closed + len(CLOSED)
    return _of_object(value), end


def _of_object(value: object) -> Call | Malformed:
    if not isinstance(value, dict):
        return Malformed('a call must be {"name": ..., "arguments": {...}}, got ' + _short(value))
    fields = cast(dict[str, Any], value)
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not name:
        return Malformed('a call must have a text as "name"')
    if isinstance(arguments, str):
        # as the API of OpenAI writes them
        try:
            arguments = DECODER.decode(arguments)
        except NOT_JSON as error:
            return Malformed(f"the arguments are not JSON: {_short(error)}", name)
    if not isinstance(arguments, dict):
        return Malformed(f"the arguments must be an object, got {_short(arguments)}", name)
    return Call(name, cast(dict[str, Any], arguments))


def _of_python(node: ast.expr) -> Call | Malformed:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return Malformed("the list must hold calls only, as in [name(argument=value)]")
    name = node.func.id
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return Malformed("name each argument, as in [name(argument=value)]", name)
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        try:
            written = json.dumps(ast.literal_eval(keyword.value), allow_nan=False)
        except NOT_PYTHON as error:
            return Malformed(f"the argument {keyword.arg} must be a literal: {_short(error)}", name)
        arguments[str(keyword.arg)] = json.loads(written)
    return Call(name, arguments)


def _by_function(path: str, function: Callable[[str], Any], text: str) -> Parsed:
    """What a user's function finds; a ValueError of it says that the turn cannot be read."""
    try:
        found = function(text)
    except ValueError as error:
        return Parsed(text, (Malformed(str(error)),))
    if not isinstance(found, list | tuple):
        raise TypeError(
            f"{path} must return a list of calls, got {type(cast(object, found)).__name__} {found!r:.80}"
        )
    return Parsed(text, tuple(_returned(path, value) for value in cast(list[Any], found)))


def _returned(path: str, value: object) -> Call | Malformed:
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    if isinstance(fields.get("error"), str):
        return Malformed(fields["error"])
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError(
            f'{path} must return calls as {{"name": text, "arguments": dict}}, or {{"error": text}}, '
            f"got {value!r:.80}"
        )
    return Call(name, cast(dict[str, Any], arguments))


def _after_prompted_thought(text: str) -> int:
    """The place behind a thought that began in the prompt; 0: there is none."""
    end = text.find(THOUGHT)
    return end + len(THOUGHT) if end >= 0 and THINK not in text[:end] else 0


def _without_thoughts(text: str) -> str:
    return re.sub(f"{THINK}.*?(?:{THOUGHT}|$)", "", text[_after_prompted_thought(text) :], flags=re.DOTALL)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _short(value: object) -> str:
    """A value by its type, or why it cannot be read, without places that say nothing to the policy."""
    match value:
        case json.JSONDecodeError() | SyntaxError():
            text = str(value.msg)
        case BaseException():
            text = str(value)
        case _:
            text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 200 else f"{text[:200]}..."
