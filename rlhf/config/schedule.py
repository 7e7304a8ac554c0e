"""Numbers of an algorithm that follow the run: where a number stands, the config may have a schedule.

    clip_high: {start: 0.28, end: 0.2, shape: linear}       or shape: cosine
    alpha: {values: [1.0e-5, 5.0e-6, 0.0]}                  each for an equal part of the run

Objectives that depend on how much of the run is left do better than constant ones (arXiv:2402.05828); its
schedules are found by meta-learning, these are written down. The list is that of TRL's XPO and Nash-MD, with
one value for each iteration. A schedule depends on the step and on `steps` alone, so a resumed run needs no
state for it.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

FORMS = (
    "{start: a, end: b, shape: linear or cosine} or {values: [a, b, ...]}, each value for an equal part of "
    "the run"
)
READ_ONCE = ("kl.target", "lr_ratio", "divergence", "critic.warmup_explained_variance")
"""Settings that a run reads once, before its first step."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """From `start` at the first step to `end` at the last one."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """The value at `progress`: 0 at the first step, 1 at the last one."""
        if progress == 1:
            return self.end
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * share

    @property
    def largest(self) -> float:
        """The value furthest from 0: 0 only where the number is 0 all along."""
        return max(self.start, self.end, key=abs)

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g} ({self.shape})"


@dataclass(frozen=True, slots=True)
class Parts:
    """Constant in each of several equal parts of the run."""

    values: tuple[float, ...]

    def at(self, progress: float) -> float:
        """As `Ramp.at`."""
        return self.values[min(int(progress * len(self.values)), len(self.values) - 1)]

    @property
    def largest(self) -> float:
        """As `Ramp.largest`."""
        return max(self.values, key=abs)

    def __str__(self) -> str:
        return " then ".join(f"{value:g}" for value in self.values)


Schedule = Ramp | Parts


def read_schedules(given: Mapping[str, Any], schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The settings `given` of an algorithm, with a Schedule wherever a mapping stands for a number.

    `schema` describes the settings, `prefix` is the dotted key of those of a part, as `kl.`. Raises
    ValueError: a mapping that is no schedule, or a schedule of something that cannot follow the run.
    """
    read = dict(given)
    for key, value in given.items():
        field = schema.model_fields.get(key)
        kind, where = None if field is None else field.annotation, f"{prefix}{key}"
        if kind is float and isinstance(value, list):
            raise ValueError(
                f"algorithm.{where}: must be a number, got {value}; for one value after the other write "
                f"{{values: {value}}}"
            )
        if kind is None or not isinstance(value, Mapping):
            continue
        value = typing.cast(Mapping[str, Any], value)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            read[key] = read_schedules(value, kind, f"{where}.")
        elif kind is float or float in typing.get_args(kind):
            read[key] = _schedule(where, value)
        else:
            raise ValueError(
                f"algorithm.{where}: got {dict(value)}, but only a number with a fraction may follow the run"
            )
    target = read.get("target")
    if prefix == "kl." and target is not None and isinstance(read.get("coef"), Ramp | Parts):
        raise ValueError(
            f"algorithm.kl.coef follows the run, and algorithm.kl.target = {target} would move it too: leave "
            "one of them out"
        )
    return read


def _schedule(where: str, given: Mapping[str, Any]) -> Schedule:
    if where in READ_ONCE:
        raise ValueError(f"algorithm.{where} is read once, before the first step: give it a number")
    kind = Parts if "values" in given else Ramp
    try:
        if unknown := set(given) - set(kind.__dataclass_fields__):
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        schedule = TypeAdapter[Schedule](kind).validate_python(given)
    except (ValidationError, ValueError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else ()
        wrong = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems] or [str(error)]
        raise ValueError(
            f"algorithm.{where}: expected a number, or {FORMS}; got {dict(given)} ({'; '.join(wrong)})"
        ) from None
    numbers = schedule.values if isinstance(schedule, Parts) else (schedule.start, schedule.end)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"algorithm.{where}: a schedule goes through finite numbers, got {dict(given)}")
    return schedule


def in_force(settings: Mapping[str, Any], progress: float | None) -> dict[str, Any]:
    """The settings with the number that each schedule has at `progress`; None: its largest."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Ramp | Parts):
            value = value.largest if progress is None else value.at(progress)
        elif isinstance(value, Mapping):
            value = in_force(typing.cast(Mapping[str, Any], value), progress)
        values[key] = value
    return values


def schedules(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    """The schedules among the settings, by their dotted key."""
    for key, value in settings.items():
        if isinstance(value, Ramp | Parts):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from schedules(typing.cast(Mapping[str, Any], value), f"{prefix}{key}.")


def with_schedules(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the schedules of `given` in place of their numbers."""
    result = dict(values)
    for key, value in given.items():
        if isinstance(value, Ramp | Parts):
            result[key] = value
        elif isinstance(value, Mapping) and any(schedules(typing.cast(Mapping[str, Any], value))):
            result[key] = with_schedules(values[key], typing.cast(Mapping[str, Any], value))
    return result
