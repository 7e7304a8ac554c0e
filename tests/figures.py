"""Leaves the figures out of the reports of runs, of which they would take the greater part of the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FIGURES = ("curve", "lines", "spread", "histogram", "stack", "intervals", "bands", "shares")


def no_figures() -> Iterator[tuple[Any, str, Any]]:
    """Object, name of its attribute, and replacement of the attribute."""
    # importing matplotlib is slow
    from rlhf.monitoring.report import plots

    for name in FIGURES:
        yield plots, name, no_figure


def no_figure(*_: object, **__: object) -> str:
    return ""
