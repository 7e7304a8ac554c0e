"""Tools as the policy sees them: JSON schemas of Python functions, and whether arguments of a call fit them.

The schema is that of transformers (`get_json_schema`), which TRL and chat templates use: names and types from
the type hints, descriptions from a Google-style docstring.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rlhf.rewards.signature import did_you_mean

EXAMPLE = '''
    """What the tool does.

    Args:
{arguments}
    """'''
NAMES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class DoesNotFit(ValueError):
    """The arguments of a call do not fit the tool; the message is for the policy."""


def schema_of(function: Callable[..., Any], called: str) -> dict[str, Any]:
    """The schema of a function or method, as chat templates take it.

    Raises ValueError, with the place and the line to add, when a type hint or a part of the docstring is
    missing. `called` is what messages call it, as "tool Calculator.add".
    """
    parameters = _parameters(function)
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(
                f"{_place(function)}: {called} takes {parameter}, but the policy gives arguments by name: "
                "name each of them, with a type hint"
            )
        if parameter.annotation is parameter.empty:
            raise ValueError(
                f"{_place(function)}: {called}: the argument {parameter.name} has no type hint: write "
                f"`{parameter.name}: float`, or int, str, bool, list[...], ..."
            )
    get_json_schema, errors = _transformers()
    try:
        return get_json_schema(function)
    except errors as error:
        arguments = "\n".join(f"        {p.name}: What it is." for p in parameters)
        raise ValueError(
            f"{_place(function)}: {called} has no schema ({_words(error)}). Its docstring must be like this:"
            f"{EXAMPLE.format(arguments=arguments)}"
        ) from None
    except NameError as error:
        raise ValueError(f"{_place(function)}: {called}: a type hint cannot be read: {error}") from None


def fitted(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as the tool gets them. Raises DoesNotFit, which says what is wrong.

    Only what JSON cannot tell apart is converted: 2.0 to an int, 2 to a float, a list to a tuple.
    """
    function = schema["function"]
    properties: Mapping[str, Any] = function["parameters"]["properties"]
    unknown = [name for name in arguments if name not in properties]
    if unknown:
        raise DoesNotFit(
            f"{function['name']} has no argument {unknown[0]!r}{did_you_mean(unknown[0], properties)}; "
            f"its arguments: {', '.join(properties) or 'none'}"
        )
    missing = [name for name in function["parameters"].get("required", ()) if name not in arguments]
    if missing:
        raise DoesNotFit(f"{function['name']} needs the argument {missing[0]!r}")
    return {name: _fit(value, properties[name], name) for name, value in arguments.items()}


def _fit(value: Any, schema: Mapping[str, Any], name: str) -> Any:
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return _fit(value, option, name)
            except DoesNotFit:
                continue
        raise DoesNotFit(f"{name} has a type that does not fit, got {_shown(value)}")
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    known = [kind for kind in kinds if kind in NAMES]
    if known and not any(_is(value, kind) for kind in known):
        raise DoesNotFit(f"{name} must be {' or '.join(NAMES[kind] for kind in known)}, got {_shown(value)}")
    if "enum" in schema and value not in schema["enum"]:
        raise DoesNotFit(f"{name} must be one of {', '.join(map(repr, schema['enum']))}, got {_shown(value)}")
    if isinstance(value, list):
        return _fit_list(cast(list[Any], value), schema, name)
    if isinstance(value, dict) and "additionalProperties" in schema:
        entries = cast(dict[str, Any], value).items()
        return {
            key: _fit(entry, schema["additionalProperties"], f"{name}[{key!r}]") for key, entry in entries
        }
    if isinstance(value, float) and "integer" in kinds and "number" not in kinds:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and kinds == ("number",):
        return _as_float(value, name)
    return cast(Any, value)


def _fit_list(values: list[Any], schema: Mapping[str, Any], name: str) -> Any:
    if "prefixItems" in schema:
        parts: Sequence[Any] = schema["prefixItems"]
        if len(parts) != len(values):
            raise DoesNotFit(f"{name} must have {len(parts)} entries, got {len(values)}")
        return tuple(
            _fit(v, part, f"{name}[{i}]") for i, (v, part) in enumerate(zip(values, parts, strict=True))
        )
    if "items" in schema:
        return [_fit(value, schema["items"], f"{name}[{i}]") for i, value in enumerate(values)]
    return values


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "integer":
            return not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            )
        case "number":
            return not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            )
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case _:
            return value is None


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise DoesNotFit(f"{name} is too large for a number") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = list(inspect.signature(function).parameters.values())
    is_method = (
        bool(found) and found[0].name in ("self", "cls") and found[0].annotation is inspect.Parameter.empty
    )
    return found[1:] if is_method else found


def _place(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _words(error: Exception) -> str:
    words = " ".join(map(str, error.args))
    return re.sub(r"Cannot generate JSON schema for \S+ because ", "", words).rstrip("!. ")


def _transformers() -> tuple[Callable[..., dict[str, Any]], tuple[type[Exception], ...]]:
    # imported here, because a process that is given the schemas must not wait for it
    from transformers.utils import chat_template_utils as utils

    # it imports torch, for one type hint; a tool with that hint has imported it already
    untyped = cast(Any, utils)
    untyped.is_torch_available = lambda: "torch" in sys.modules
    return untyped.get_json_schema, (utils.TypeHintParsingException, utils.DocstringParsingException)
