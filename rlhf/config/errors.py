"""Error messages for wrong settings: the key, what was expected, what came, and which key was meant."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf.algos.table import ALGORITHMS
from rlhf.config.foreign import trl, verl
from rlhf.config.foreign.names import MEANT
from rlhf.config.foreign.preferences import RENAMED, answer_for_setting


@dataclass(frozen=True, slots=True)
class Arguments:
    """The settings that single algorithms have."""

    algorithm: str = ""
    """The algorithm that the run has."""
    own: frozenset[str] = frozenset()
    """Its settings that are no sections."""
    owners: Mapping[str, str] = field(default_factory=dict[str, str])
    """For each setting of any algorithm, the names of the algorithms that have it."""


def explain(
    error: ValidationError, *, prefix: str, schema: type[BaseModel], arguments: Arguments = Arguments()
) -> Iterator[str]:
    """A line for each problem of `error`: the key, what was expected, what came, and for an unknown key the
    one that was probably meant.

    `prefix`: dotted key of the section that `schema` describes. `arguments`: what an unknown key may stand
    for besides the settings of `schema`.
    """
    problems, before = error.errors(), None
    for problem in problems:
        where = ".".join([prefix, *map(str, problem["loc"])] if prefix else map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            for name, value in verl.leaves(where, problem["input"]):
                yield f"unknown setting {name}{_help(name, value, prefix, schema, arguments)}"
        elif problem["type"] == "too_short":
            # pydantic also calls a list too short when its entries have problems, which have own lines
            if not any(len(p["loc"]) > len(problem["loc"]) for p in problems):
                yield f"{where}: needs at least {problem.get('ctx', {}).get('min_length', 1)}, got none"
        elif problem["type"] == "missing":
            yield f"{where} is required"
        elif problem["type"] == "value_error":
            yield f"{where}: {message}" if where and not message.startswith(where) else message
        elif _branch(problem) is None:
            yield f"{where}: must {_expected(problem, schema)}, got {problem['input']!r:.200}"
        elif _branch(problem) != _branch(before):
            branches = [_expected(p, schema) for p in problems if _branch(p) == _branch(problem)]
            place = where.rpartition(".")[0]
            yield f"{place}: must {' or '.join(branches)}, got {problem['input']!r:.200}"
        before = problem


def _help(where: str, value: object, prefix: str, schema: type[BaseModel], arguments: Arguments) -> str:
    """What follows the unknown setting `where`: the setting of the run's algorithm, the answer for one of
    TRL, the nearest setting, or the algorithms that have such a setting; nothing where there is none."""
    last = where.rpartition(".")[2]
    argument = RENAMED.get((arguments.algorithm, last), last)
    if argument in arguments.own and f"algorithm.{argument}" != where:
        return f"; did you mean algorithm.{argument}?"
    answer = answer_for_setting(last, value)
    if answer is not None:
        return f"; coming from TRL: {answer}"
    answer = verl.answer(where, value)
    if answer is not None:
        return f"; coming from verl: {answer}"
    answer = trl.answer(last, value) if last not in MEANT else None
    if answer is not None:
        return f"; coming from TRL: {answer}"
    if last in ALGORITHMS:
        return f"; did you mean algorithm.name={last}?"
    owner = arguments.owners.get(last)
    hint = nearest_setting(where, prefix, schema, cutoff=0.7 if owner is None else 0.85)
    if hint:
        return f"; did you mean {hint}?"
    return f", which is one of {owner}" if owner else ""


def _branch(problem: ErrorDetails | None) -> tuple[int | str, ...] | None:
    """The place of a setting that may be of several types, for which pydantic reports a problem for each
    type; None for a problem of another kind."""
    *place, last = problem["loc"] if problem else ("",)
    return tuple(place) if re.match(r"constrained-|literal\[", str(last)) else None


def _expected(problem: ErrorDetails, schema: type[BaseModel]) -> str:
    """What was expected, as words that follow "must"."""
    limits: Mapping[str, Any] = problem.get("ctx", {})
    kind = problem["type"]
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        return words.format(limits[key])
    if kind == "literal_error":
        allowed: str = limits["expected"]
        near = difflib.get_close_matches(str(problem["input"]), allowed.split("'")[1::2], n=1)
        return f"be {allowed}" + (f" (did you mean {near[0]}?)" if near else "")
    if kind in ("model_type", "model_attributes_type"):
        section = _section_at(problem["loc"], schema)
        keys = ", ".join(section.model_fields) if section else ""
        return f"be a section, with settings of {keys}" if keys else "be a section of settings"
    return next((words for start, words in KINDS.items() if kind.startswith(start)), problem["msg"])


BOUNDS = {
    "greater_than": ("gt", "be above {:g}"),
    "greater_than_equal": ("ge", "be {:g} or more"),
    "less_than": ("lt", "be below {:g}"),
    "less_than_equal": ("le", "be {:g} or less"),
}
KINDS = {
    "int": "be a whole number",
    "float": "be a number",
    "bool": "be true or false",
    "string": "be text",
    "tuple": "be a list",
    "list": "be a list",
    "dict": "be settings with their values",
}


def _section_at(place: Sequence[int | str], schema: type[BaseModel]) -> type[BaseModel] | None:
    """The section whose keys lead from `schema` along `place`; None where there is none."""
    found: type[BaseModel] | None = schema
    for key in place:
        field = None if found is None else found.model_fields.get(str(key))
        found = None if field is None else section_of(field.annotation)
    return found


def nearest_setting(where: str, prefix: str, schema: type[BaseModel], *, cutoff: float) -> str | None:
    """The setting that was probably meant by an unknown one, by its spelling or as another framework's name.

    `cutoff`: how similar in spelling a setting must be, 0 to 1.
    """
    names = list(setting_names(schema, f"{prefix}." if prefix else ""))
    parent, _, last = where.rpartition(".")
    siblings = {n.rpartition(".")[2]: [n] for n in names if n.rpartition(".")[0] == parent}
    leaves: dict[str, list[str]] = {}
    for name in names:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    return (
        _close(last, siblings, 0.85)
        or MEANT.get(last)
        or _close(last, siblings, cutoff)
        or _close(last, leaves, cutoff)
        or _close(where, {name: [name] for name in names}, cutoff)
        or _close(last, {theirs: [ours] for theirs, ours in MEANT.items()}, 0.85)
    )


def _close(word: str, settings: Mapping[str, Sequence[str]], cutoff: float) -> str | None:
    """The settings of the word most similar to `word`, if one is similar enough."""
    near = difflib.get_close_matches(word, settings, n=1, cutoff=cutoff)
    return " or ".join(settings[near[0]]) if near else None


def setting_names(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the settings, except those of single algorithms."""
    for key, info in schema.model_fields.items():
        section = section_of(info.annotation)
        if section is None:
            yield f"{prefix}{key}"
        else:
            yield from setting_names(section, f"{prefix}{key}.")


def section_of(kind: Any) -> type[BaseModel] | None:
    """The class of a section, where `kind` is `Section` or `Section | None`; else None."""
    parts = typing.get_args(kind)
    if len(parts) == 2 and parts[1] is type(None):
        kind = parts[0]
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None
