"""The settings of another framework while they are turned into ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast


class Given:
    """Settings by their (dotted) names, with the other framework's defaults behind them.

    What is read counts as turned into ours, so `left` has the settings that nothing asked for.
    """

    def __init__(self, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._defaults = defaults
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.settings

    def __getitem__(self, key: str) -> Any:
        """The value of a setting: what was given, else the default, else None."""
        self.read.add(key)
        return self.settings.get(key, self._defaults.get(key))

    def seen(self, *keys: str) -> None:
        """Settings that need no words, whatever else is set."""
        self.read.update(keys)

    def several(self, key: str) -> list[Any]:
        """A setting that may be one value, a list or none."""
        value = self[key]
        if isinstance(value, list):
            return cast(list[Any], value)
        return [] if value is None else [value]

    def whole(self, key: str) -> int:
        """A setting that is a whole number of at least 1. Raises ValueError: it is another value."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r:.80}")
        return int(value)

    def left(self) -> Iterator[str]:
        """The settings that were given and not read."""
        return (key for key in self.settings if key not in self.read)


@dataclass
class Ours:
    """Our settings by their dotted names, and a sentence for each foreign one that needs words."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: dict[str, str] = field(default_factory=dict[str, str])
    read: set[str] = field(default_factory=set[str])
    """The foreign settings that were looked at, given or not."""
    launch: str = ""
    """How to start the run, where more than one process was asked for."""

    def note(self, given: Given, key: str, text: str) -> None:
        """Says what stands for the setting `key`, if it was given."""
        if key in given:
            self.notes.setdefault(key, text)


Convert = Callable[[Mapping[str, Any]], Ours]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree by their dotted names, behind `prefix`."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def stands_for(convert: Convert, key: str, value: Any) -> str | None:
    """What stands for one foreign setting, as `rollout.group_size=8` or a sentence; None: nothing is known.

    It is what the setting changes in a conversion of the defaults.
    """
    try:
        before, after = convert({}), convert({key: value})
    except ValueError:
        return None
    changed = [
        f"{name}={written(found)}"
        for name, found in after.settings.items()
        if before.settings.get(name, ...) != found
    ]
    note = after.notes.get(key, "")
    return ", ".join(changed) + (f"; {note}" if changed and note else note) or None


def written(value: Any) -> str:
    """A value as it is written in an override."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {written(v)}" for k, v in cast(dict[str, Any], value).items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, cast(list[Any], value))) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
