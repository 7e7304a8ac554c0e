"""Settings from YAML and overrides; an algorithm's keyword arguments as settings."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.table import ALGORITHMS
from rlhf.mistakes import explain
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
    if name.endswith(".py"):
        raise ValueError(
            f"algorithm.name is the file {name}: name a function in it too, as {name}:my_algorithm"
        )
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
        told = explain(error, prefix="algorithm", schema=schema, owners=_owners())
        raise ValueError("\n".join(told)) from None
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


def _owners() -> dict[str, str]:
    """Keys of algorithms, and the algorithms that have each."""
    owners: dict[str, list[str]] = {}
    for name, factory in ALGORITHMS.items():
        for key in inspect.signature(factory).parameters:
            owners.setdefault(key, []).append(name)
    return {key: ", ".join(names) for key, names in owners.items()}


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of a YAML file with the overrides in it, not checked yet. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}")
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_problem_of(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
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
        if parent == "algorithm" and isinstance(child, str):
            child = node[parent] = {"name": child}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
        node = typing.cast(dict[str, Any], child)
    try:
        node[last] = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {_problem_of(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as in YAML 1.2, and a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                line = first[key.value].line + 1
                said = f"{key.value} is given a second time (it was in line {line})"
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


# its stub has no types
typing.cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """Plain values alone. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def _problem_of(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    where = f"in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    tab = "; indent with spaces" if "'\\t'" in (error.problem or "") else ""
    return f"{error.problem} {where}{tab}"


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
