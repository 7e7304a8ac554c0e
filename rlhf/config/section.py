"""`Section`, the base class of all sections of the settings; bounded numbers, errors, masked secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]

MASK = "***"
_NAMES = re.compile(
    r"(.*[-_])?(password|passwd|passphrase|secret|credentials?|authorization|cookie)"
    r"|(.*[-_])?(api|access|secret|private|auth)[-_]?key|apikey"
    r"|((.*[-_])?(api|access|auth|bearer|hf|secret|session|refresh)[-_]?)?token",
    re.IGNORECASE,
)
"""Names of settings, headers and parameters of addresses whose values are secrets."""
_USER = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]*)@")
_PARAMETER = re.compile(r"(?<=[?&])([^=&\s#]+)=([^&\s#]+)")


class Section(BaseModel):
    """A part of the settings: it cannot be changed, and an unknown key or a value out of range is an
    error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


class ConfigError(ValueError):
    """A setting is wrong. The message has a line for each problem: the key, what was expected, what came."""


def masked(value: Any, name: str = "") -> Any:
    """The settings with `***` in place of each secret: headers, passwords and keys, also within addresses.

    Names of environment variables, as in `key_variable`, are no secrets.
    """
    match value:
        case dict():
            inner = cast(Mapping[str, Any], value)
            return {
                key: _hidden(item) if _is_secret(key, name) else masked(item, str(key))
                for key, item in inner.items()
            }
        case list() | tuple():
            return [masked(item, name) for item in cast(list[Any], value)]
        case str():
            return masked_text(value)
        case _:
            return value


def masked_text(text: str) -> str:
    """A text in which passwords and keys of addresses are masked: `http://me:***@host/?api_key=***`."""
    if "://" not in text:
        return text
    text = _USER.sub(rf"\1:{MASK}@", text)
    return _PARAMETER.sub(lambda m: f"{m[1]}={MASK}" if _is_secret(m[1], "") or m[1] == "key" else m[0], text)


def holds_mask(value: Any) -> bool:
    """Whether some text in `value` was masked."""
    match value:
        case dict():
            return any(map(holds_mask, cast(dict[str, Any], value).values()))
        case list() | tuple():
            return any(map(holds_mask, cast(list[Any], value)))
        case _:
            return isinstance(value, str) and (value == MASK or f":{MASK}@" in value or f"={MASK}" in value)


def _is_secret(key: object, parent: str) -> bool:
    """Whether the value under `key` is a secret; of headers all are, because any of them may be a key."""
    return parent == "headers" or _NAMES.fullmatch(str(key)) is not None


def _hidden(value: Any) -> Any:
    return MASK if isinstance(value, str) and value else value
