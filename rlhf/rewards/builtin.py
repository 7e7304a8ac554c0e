"""Built-in rewards: number, exact, format and JSON matches, completion length, overlong penalty."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

from rlhf.rewards.numbers import final_answer, read_gold

FENCED = re.compile(r"```(?:jsonc?)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)

Completion = str | Sequence[Mapping[str, Any]]


def numeric_match(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float]:
    """1 where the number that the completion gives as its answer equals `answer`, else 0.

    rlhf/rewards/numbers.py says where the answer is looked for and what counts as a number. If `answer` is
    text, it is read in the same way.

    Raises ValueError for an answer without a number.
    """
    expected = [read_gold(value, "numeric_match") for value in answer]
    found = [final_answer(completion_text(completion)) for completion in completions]
    return [float(a is not None and b.equals(a)) for a, b in zip(found, expected, strict=True)]


def exact_match(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float]:
    """1 where the completion equals `answer`, white space around either ignored, else 0.

    Raises ValueError for an answer that is None.
    """
    if any(value is None for value in answer):
        raise ValueError("exact_match needs a text or a number in the column 'answer', got None")
    texts = [completion_text(completion).strip() for completion in completions]
    return [float(text == str(value).strip()) for text, value in zip(texts, answer, strict=True)]


def format_match(
    completions: Sequence[Completion], pattern: str | Sequence[str], opened: str = ""
) -> list[float]:
    """1 where the whole completion matches `pattern`, else 0.

    A `pattern` given as text is a regular expression, in which the dot also matches line ends. A list names
    tags: `["think", "answer"]` asks for `<think>...</think>` and then `<answer>...</answer>`, each once, with
    only white space outside.

    `opened` is put before each completion: the end of the prompt, where that already opens the first tag. A
    run sets it for a list of tags where every prompt ends so (rlhf/preflight/tags.py).
    """
    expression = pattern if isinstance(pattern, str) else _tags(pattern)
    form = re.compile(expression, re.DOTALL)
    texts = [opened + completion_text(completion) for completion in completions]
    return [float(form.fullmatch(text) is not None) for text in texts]


def json_match(completions: Sequence[Completion], schema: Mapping[str, Any] | None = None) -> list[float]:
    """1 where the completion, or its only fenced block, is JSON that is valid under `schema`; else 0.

    Without `schema` any JSON is accepted. A schema needs the package `jsonschema` (extra `rewards`).

    Raises jsonschema.SchemaError when `schema` is not a valid JSON schema.
    """
    check = _schema_check({} if schema is None else schema)
    return [float(_is_json(completion_text(completion), check)) for completion in completions]


def length(
    completion_ids: Sequence[Sequence[int]], target: int | None = None, scale: float = 1.0
) -> list[float]:
    """Minus the number of tokens, or minus its distance from `target` if one is given, divided by `scale`."""
    goal = 0 if target is None else target
    return [-abs(len(ids) - goal) / scale for ids in completion_ids]


def overlong(completion_ids: Sequence[Sequence[int]], max_tokens: int, cache: int) -> list[float]:
    """0 up to `max_tokens - cache` tokens, then falling linearly to -1 at `max_tokens`, and -1 beyond.

    Source: DAPO, arXiv:2503.14476 eq. 13. The setting `algorithm.overlong_cache` adds the same penalty to the
    weighted sum of all objectives; this function is an objective of its own.

    Raises ValueError unless 0 < cache <= max_tokens.
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"overlong needs 0 < cache <= max_tokens, got {cache} and {max_tokens}")
    return [min(0.0, max(-1.0, (max_tokens - cache - len(ids)) / cache)) for ids in completion_ids]


def completion_text(completion: Completion) -> str:
    """The text that the policy wrote: a plain completion itself, or the content of its last chat message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def as_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text: of a chat, a line `role: content` for each message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def compared_texts(first: Completion, second: Completion) -> tuple[str, str]:
    """Two completions as a judge reads them: what the policy wrote, or, where one of them is an episode of
    several messages, both as whole conversations, a line for each message."""
    if is_conversation(first) or is_conversation(second):
        return conversation_text(first), conversation_text(second)
    return completion_text(first), completion_text(second)


def is_conversation(completion: Completion) -> bool:
    """Whether a completion is an episode of several messages, or calls tools."""
    return not isinstance(completion, str) and bool(len(completion) > 1 or completion[-1].get("tool_calls"))


def conversation_text(messages: Completion) -> str:
    """Messages as lines `role: content`, with calls of tools; what is no text is named by its type."""
    return messages if isinstance(messages, str) else "\n".join(map(message_line, messages))


def message_line(message: Mapping[str, Any]) -> str:
    """One message as a line `role: content`, with its calls of tools."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        parts = cast(Sequence[Mapping[str, Any]], content)
        content = " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in parts)
    calls = [f"[calls {json.dumps(call, ensure_ascii=False)}]" for call in message.get("tool_calls") or ()]
    return f"{message['role']}: " + " ".join([content, *calls]).strip()


def last_number(text: str) -> Fraction | None:
    """The number that `numeric_match` reads in `text`; None if there is none, or a list or a time.

    Example: `last_number("3 + 5 = 8.0!") == 8`.
    """
    answer = final_answer(text)
    return answer.values[0] if answer is not None and answer.kind == "one" else None


def _is_json(text: str, check: Callable[[Any], bool]) -> bool:
    fenced = FENCED.fullmatch(text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return check(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _anything(value: Any) -> bool:
    return True


def _schema_check(schema: Mapping[str, Any]) -> Callable[[Any], bool]:
    if not schema:
        return _anything
    import jsonschema  # pyright: ignore[reportMissingModuleSource]

    library: Any = jsonschema
    kind = library.validators.validator_for(schema, default=library.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema).is_valid


def _tags(names: Sequence[str]) -> str:
    one_each = (rf"<{name}>(?:(?!</?{name}>).)*</{name}>" for name in map(re.escape, names))
    return r"\s*" + r"\s*".join(one_each) + r"\s*"
