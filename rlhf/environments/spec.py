"""`EnvironmentSpec`: the settings of the environments of a run, as their processes get them.

A module of its own, because a process that reads it must not wait for the import of all settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """What a process must know: which environments, and its limits. It holds episodes of all of them."""

    kind: ClassVar[str] = "environment"

    paths: tuple[str, ...]
    """Absolute paths of classes and functions."""
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calls: str = "json_tags"
    timeout: float = 30.0
    workers: int = 1
    memory_gib: float = 4.0
    processes: int = 256
    """Most processes, the worker itself and those that its environments start."""
    variables: Sequence[str] = ()
    gpu: bool = False
    is_alone: bool = False
    """Whether the process has one episode only, which then has the global random generators for itself."""
    schemas: Mapping[str, Any] | None = None
    """The schemas of tools by function, of the process that was started first: making them takes a second."""

    @property
    def path(self) -> str:
        """What messages call it before it has a name."""
        return ", ".join(self.paths)
