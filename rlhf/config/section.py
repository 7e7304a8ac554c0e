"""`Section`, the base class of all sections of the settings, their bounded numbers, and `ConfigError`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the settings: it cannot be changed, and an unknown key or a value out of range is an
    error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


class ConfigError(ValueError):
    """A setting is wrong. The message has a line for each problem: the key, what was expected, what came."""
