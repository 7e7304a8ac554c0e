"""Writes the config that stands for settings of verl or TRL, with a line for what has no counterpart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.foreign import trl, verl
from rlhf.config.foreign.given import Ours, written
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.migrate.read import Found, read

ORDER = ("run_dir", "steps", "seed", "model", "data", "reward", "algorithm", "rollout", "learner")
VERSIONS = {"verl": "verl 0.9", "TRL": "TRL 1.16"}


def migrated(path: Path) -> str:
    """The text of a config for the settings in `path`.

    Raises ConfigError: the file has no settings of verl or TRL, or they do not fit together.
    """
    found = read(path)
    try:
        ours = (
            verl.convert(found.settings)
            if found.framework == "verl"
            else trl.convert(found.settings, found.method)
        )
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    for function in ours.settings.get("reward.functions", ()):
        function["path"] = function["path"].replace("FILE:", f"{path}:")
    tree = _nested(ours.settings)
    try:
        make_config(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: what stands for it here is refused:\n{error}") from None
    return "\n".join([*_head(path, found, ours), *_body(tree)]) + "\n"


def _head(path: Path, found: Found, ours: Ours) -> Iterator[str]:
    count = len(found.settings) + len(found.unknown)
    yield (
        f"# From {path.name}: {count} settings of {found.framework}; where it is silent, the defaults of "
        f"{VERSIONS[found.framework]} hold."
    )
    yield "# Look through it, then: rlhf check FILE"
    if ours.launch:
        yield f"# Start it with: {ours.launch} FILE"
    if ours.notes or found.unknown:
        yield "#"
        yield "# Without a counterpart of one name:"
    for key, text in ours.notes.items():
        value = f"={written(found.settings[key])}" if key in found.settings else ""
        yield from _comment(f"{key}{value}: {text}")
    for key, code in found.unknown.items():
        yield from _comment(f"{key}: computed by the code `{code:.60}`; set what stands for it")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="#   ", subsequent_indent="#     ", break_long_words=False)


def _body(tree: dict[str, Any]) -> Iterator[str]:
    names = [name for name in ORDER if name in tree] + [name for name in tree if name not in ORDER]
    for name in names:
        text = yaml.safe_dump({name: tree[name]}, sort_keys=False, allow_unicode=True, width=100)
        yield text.rstrip()


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
