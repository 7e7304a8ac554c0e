"""A run's settings for a command, which may be called in another folder than the run was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rlhf.config.overrides import apply_override


def taken_settings(
    own: Mapping[str, Any], folder: Path | None, sections: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """The `sections` of a run's settings, each a dict, and its seed, with overrides in their place.

    `folder`: where its relative paths start from. Raises ConfigError: an override is malformed.
    """
    tree: dict[str, Any] = {key: located(own[key], folder) for key in (*sections, "seed") if key in own}
    for override in overrides:
        apply_override(tree, override)
    return tree | {section: dict(tree.get(section) or {}) for section in sections}


def located(value: Any, folder: Path | None) -> Any:
    """Settings in which each text that names something in `folder` names it by its absolute path.

    `value`: a setting, or a tree of them. Of `path/file.py:name` the file counts; names of models on the hub,
    and of anything else that is not there, stay as they are.
    """
    if folder is None:
        return value
    if isinstance(value, Mapping):
        return {key: located(entry, folder) for key, entry in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list):
        return [located(entry, folder) for entry in cast(list[Any], value)]
    if not isinstance(value, str) or not value or Path(value).is_absolute() or value.startswith("~"):
        return value
    path, colon, name = value.rpartition(":")
    if not path.endswith(".py"):
        path, colon, name = value, "", ""
    # a word such as `native` is no path, whatever files there are
    is_path = "/" in path or Path(path).suffix != ""
    return f"{(folder / path).resolve()}{colon}{name}" if is_path and (folder / path).exists() else value
