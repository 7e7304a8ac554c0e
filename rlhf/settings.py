"""Settings from YAML and overrides; an algorithm's keyword arguments as settings; how a mistake is told."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.table import ALGORITHMS
from rlhf.plugins import load_plugin

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


class ConfigError(ValueError):
    """A setting is wrong. The message has one line a problem: the key, what was expected, what came."""


def algorithm_factory(name: str) -> Callable[..., Algorithm]:
    """The function behind `algorithm.name`: of the table, or of a user's file."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        found: Any = load_plugin(name)
        if not callable(found):
            raise ValueError(f"algorithm.name: {name} must be a function, got {found!r:.80}")
        return typing.cast(Callable[..., Algorithm], found)
    near = difflib.get_close_matches(name, ALGORITHMS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(f"unknown algorithm {name!r}{hint} There are: {', '.join(ALGORITHMS)}")


def resolve_algorithm(settings: Mapping[str, Any], *, max_tokens: int) -> dict[str, Any]:
    """`algorithm` with every default filled in; `max_tokens` is the completion limit unless given."""
    name = settings["name"]
    schema = _schema(algorithm_factory(name))
    given = {key: value for key, value in settings.items() if key != "name"}
    if "max_tokens" in schema.model_fields:
        given.setdefault("max_tokens", max_tokens)
    try:
        resolved = schema.model_validate(given)
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, prefix="algorithm", schema=schema))) from None
    values = {key: getattr(resolved, key) for key in schema.model_fields}
    factory = algorithm_factory(name)
    hints = typing.get_type_hints(factory)
    for key, value in values.items():
        if isinstance(value, BaseModel):
            values[key] = hints[key](**value.model_dump())
    made = typing.cast(object, factory(**values))
    if not isinstance(made, Algorithm):
        raise ValueError(f"algorithm.name: {name} must return an Algorithm, got {made!r:.80}")
    return {"name": name, **values}


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of a YAML file with the overrides in it, not checked yet. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_problem_of(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(tree).__name__}")
    settings = typing.cast(dict[str, Any], tree)
    for override in overrides:
        apply_override(settings, override)
    return settings


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Puts `dotted.key=value` into a tree of settings. Raises ConfigError when it is malformed."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override is key=value, got {override!r}")
    *parents, last = key.split(".")
    node = settings
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
        node = typing.cast(dict[str, Any], child)
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {_problem_of(error)}") from None


def _problem_of(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _schema(function: Callable[..., Any], defaults: Mapping[str, Any] | None = None) -> type[BaseModel]:
    """A pydantic model of a function's or dataclass's keyword arguments, with other defaults where given.

    A nested dataclass becomes a model whose defaults are the fields of the argument's default:
    `kl: {coef: 0.01}` changes one of the algorithm's own KL settings and keeps the others.
    """
    fields: dict[str, Any] = {}
    name = typing.cast(str, getattr(function, "__name__", "settings"))
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    for key, parameter in inspect.signature(function).parameters.items():
        if key not in hints:
            raise ValueError(
                f"argument {key!r} of {name} has no annotation; its type is what the config checks"
            )
        kind, default = hints[key], (defaults or {}).get(key, parameter.default)
        if dataclasses.is_dataclass(kind) and dataclasses.is_dataclass(default):
            default = dataclasses.asdict(typing.cast(Any, default))
            kind = _schema(typing.cast(type, kind), default)
        fields[key] = (kind, ... if default is inspect.Parameter.empty else default)
    return create_model(name, __config__=ConfigDict(extra="forbid", validate_default=True), **fields)


def setting_names(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key there is, algorithms' own excepted."""
    for key, info in schema.model_fields.items():
        section = _section(info.annotation)
        if section is None:
            yield f"{prefix}{key}"
        else:
            yield from setting_names(section, f"{prefix}{key}.")


def _section(kind: Any) -> type[BaseModel] | None:
    """The section behind `Section`, or behind `Section | None`: one that may be left out."""
    parts = typing.get_args(kind)
    if len(parts) == 2 and parts[1] is type(None):
        kind = parts[0]
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def explain(error: ValidationError, *, prefix: str, schema: type[BaseModel]) -> Iterator[str]:
    """A line a problem: the key, what was expected, what came; the nearest neighbour of an unknown one."""
    problems = error.errors()
    for problem in problems:
        where = ".".join([prefix, *map(str, problem["loc"])] if prefix else map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            hint = _nearest(where, prefix, schema)
            yield f"unknown setting {where}" + (f"; did you mean {hint}?" if hint else "")
        elif problem["type"] == "too_short":
            # a list is also too short when none of its entries is right
            if not any(len(p["loc"]) > len(problem["loc"]) for p in problems):
                yield f"{where}: needs at least {problem.get('ctx', {}).get('min_length', 1)}, got none"
        elif problem["type"] == "missing":
            yield f"{where} is required"
        elif problem["type"] == "value_error":
            yield f"{where}: {message}" if where and not message.startswith(where) else message
        else:
            yield f"{where}: {message}, got {problem['input']!r}"


def _nearest(where: str, prefix: str, schema: type[BaseModel]) -> str | None:
    names = list(setting_names(schema, f"{prefix}." if prefix else ""))
    parent, _, last = where.rpartition(".")
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == parent}
    leaves = {n.rpartition(".")[2]: n for n in names}
    for candidates in (siblings, leaves):
        near = difflib.get_close_matches(last, candidates, n=1)
        if near:
            return candidates[near[0]]
    near = difflib.get_close_matches(where, names, n=1)
    return near[0] if near else None
