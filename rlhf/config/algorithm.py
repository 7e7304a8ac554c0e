"""The section `algorithm`: finds the function that `algorithm.name` names, checks its keyword arguments."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.table import ALGORITHMS
from rlhf.config.errors import Arguments, explain
from rlhf.config.foreign.preferences import answer_for_method
from rlhf.config.schedule import in_force, read_schedules, schedules, with_schedules
from rlhf.plugins import load_plugin


def algorithm_factory(name: str) -> Callable[..., Algorithm]:
    """The function that `algorithm.name` names: one of `ALGORITHMS`, or one of the user's.

    Raises ValueError: there is no such name (the nearest one is suggested), or it is no function.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        found: Any = load_plugin(name)
        if not callable(found):
            raise ValueError(f"algorithm.name: {name} must be a function, got {found!r:.80}")
        return typing.cast(Callable[..., Algorithm], found)
    if name.endswith(".py"):
        raise ValueError(
            f"algorithm.name is the file {name}: name a function in it too, as {name}:my_algorithm"
        )
    answer = answer_for_method(name)
    if answer is not None:
        raise ValueError(f"unknown algorithm {name!r}: {answer}")
    near = difflib.get_close_matches(name.lower(), ALGORITHMS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(f"unknown algorithm {name!r}{hint} There are: {', '.join(ALGORITHMS)}")


def resolve_algorithm(settings: Mapping[str, Any], *, max_tokens: int) -> dict[str, Any]:
    """The section `algorithm` with every default filled in.

    `max_tokens` is for an algorithm that has such an argument and is not given it: the completion limit.
    Numbers that follow the run are schedules in it. Raises ValueError, one line for each problem.
    """
    name = settings["name"]
    schema = _schema(algorithm_factory(name))
    given = {key: value for key, value in settings.items() if key != "name"}
    if "max_tokens" in schema.model_fields:
        given.setdefault("max_tokens", max_tokens)
    given = read_schedules(given, schema)
    followed = dict(schedules(given))
    for point in (0, POINTS, *range(1, POINTS)) if followed else ():
        progress = point / POINTS
        try:
            _made(name, _checked(name, schema, in_force(given, progress)))
        except ValueError as error:
            numbers = ", ".join(f"{key} = {schedule.at(progress):g}" for key, schedule in followed.items())
            raise ValueError(f"{error} (when {point}% of the run is done: {numbers})") from None
    values = _checked(name, schema, in_force(given, None))
    _made(name, values)
    return {"name": name, **_parts_made(algorithm_factory(name), with_schedules(values, given))}


POINTS = 100
"""Schedules are checked where each percent of the run is done."""


def make_algorithm(settings: Mapping[str, Any], progress: float | None = None) -> Algorithm:
    """The algorithm of settings from `resolve_algorithm`, with the numbers in force at `progress`: 0 at the
    first step, 1 at the last one.

    None: with each number that follows the run at its largest, so that the algorithm needs whatever it
    needs at any time, such as a reference for a `kl.coef` that falls to 0.
    """
    values = in_force(settings, progress)
    return _made(values.pop("name"), values)


def _checked(name: str, schema: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every default filled in, each part a dict. Raises ValueError."""
    try:
        resolved = schema.model_validate(given)
    except ValidationError as error:
        lines = explain(error, prefix="algorithm", schema=schema, arguments=arguments_of(name))
        raise ValueError("\n".join(lines)) from None
    if wrong := list(_not_numbers(resolved.model_dump(), "algorithm")):
        raise ValueError("\n".join(f"{key}: must be a number, got nan" for key in wrong))
    values = {key: getattr(resolved, key) for key in schema.model_fields}
    return {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in values.items()}


def _made(name: str, values: Mapping[str, Any]) -> Algorithm:
    """The algorithm of these settings, whose parts are dicts or already made. Raises ValueError."""
    factory = algorithm_factory(name)
    made = typing.cast(object, factory(**_parts_made(factory, values)))
    if not isinstance(made, Algorithm):
        raise ValueError(f"algorithm.name: {name} must return an Algorithm, got {made!r:.80}")
    return made


def _parts_made(factory: Callable[..., Algorithm], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with each part, such as `kl`, as the value that the factory takes; a part in which a
    number follows the run stays a dict."""
    hints, made = typing.get_type_hints(factory), dict(values)
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            part = typing.cast(dict[str, Any], value)
            made[key] = part if any(schedules(part)) else hints[key](**part)
    return made


def _not_numbers(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The dotted keys of the values that are NaN. Infinity is a bound that never binds."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _not_numbers(typing.cast(dict[str, Any], value), f"{prefix}.{key}")
        elif isinstance(value, float) and math.isnan(value):
            yield f"{prefix}.{key}"


def arguments_of(name: object) -> Arguments:
    """What a message about an unknown setting has to know of the algorithms; `name` may be of none."""
    owners: dict[str, list[str]] = {}
    for owner, factory in ALGORITHMS.items():
        for key in inspect.signature(factory).parameters:
            owners.setdefault(key, []).append(owner)
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(ValueError):
        parameters = inspect.signature(algorithm_factory(str(name))).parameters
    own = frozenset(key for key, p in parameters.items() if not dataclasses.is_dataclass(p.default))
    return Arguments(str(name), own, {key: ", ".join(names) for key, names in owners.items()})


def _schema(function: Callable[..., Any], defaults: Mapping[str, Any] | None = None) -> type[BaseModel]:
    """A pydantic model of the keyword arguments of a function or dataclass; `defaults` replace its own.

    An argument that is a dataclass becomes a nested model, whose defaults are the fields of the argument's
    default: `kl: {coef: 0.01}` changes one KL setting of the algorithm and keeps its others.
    """
    fields: dict[str, Any] = {}
    name = typing.cast(str, getattr(function, "__name__", "settings"))
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    for key, parameter in inspect.signature(function).parameters.items():
        if key not in hints:
            raise ValueError(
                f"argument {key!r} of {name} has no annotation: the config needs its type to check the value"
            )
        kind, default = hints[key], (defaults or {}).get(key, parameter.default)
        if dataclasses.is_dataclass(kind) and dataclasses.is_dataclass(default):
            default = dataclasses.asdict(typing.cast(Any, default))
            kind = _schema(typing.cast(type, kind), default)
        fields[key] = (kind, ... if default is inspect.Parameter.empty else default)
    return create_model(name, __config__=ConfigDict(extra="forbid", validate_default=True), **fields)
