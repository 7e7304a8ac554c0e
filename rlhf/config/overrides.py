"""Reads settings, a YAML file or a dict, and puts `key=value` overrides into them: a plain tree, whose values
are not checked yet."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.section import ConfigError

ALONE = {"algorithm": "name", "model": "path"}
"""Sections that may be given as one value, and the setting that this value is."""


def read_settings(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of a YAML file, or a copy of a dict, with the overrides put into it; keys and values are not
    checked yet.

    Raises ConfigError: there is no such file, it is not UTF-8, not YAML or no mapping, or an override is
    malformed.
    """
    settings = _copied(source) if isinstance(source, Mapping) else _read_file(Path(source))
    for override in overrides:
        apply_override(settings, override)
    spell_out(settings)
    return settings


def spell_out(settings: dict[str, Any]) -> None:
    """Makes sections of those that are given as one value, as `model: PATH`."""
    for section, name in ALONE.items():
        if isinstance(settings.get(section), str):
            settings[section] = {name: settings[section]}


def _copied(tree: Any) -> Any:
    """A copy that overrides may change, with a text for each path."""
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in typing.cast(Mapping[Any, Any], tree).items()}
    return str(tree) if isinstance(tree, Path) else tree


def _read_file(path: Path) -> dict[str, Any]:
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
    return typing.cast(dict[str, Any], tree)


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Puts `dotted.key=value` into a tree of settings. Raises ConfigError when it is malformed."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must be key=value, got {override!r}")
    if key == "model" and not text.lstrip().startswith("{"):
        # its other settings stay, as those of another algorithm could not
        key = "model.path"
    *parents, last = key.split(".")
    node = settings
    for parent in parents:
        child = node.setdefault(parent, {})
        if parent in ALONE and isinstance(child, str):
            child = node[parent] = {ALONE[parent]: child}
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
                problem = f"{key.value} is given a second time (it was in line {line})"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


# PyYAML's stub has no types for add_implicit_resolver
typing.cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """Parses YAML into plain values. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:
        # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def _problem_of(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    where = f"in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    tab = "; indent with spaces" if "'\\t'" in (error.problem or "") else ""
    return f"{error.problem} {where}{tab}"
