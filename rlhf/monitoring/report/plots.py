"""Curves as SVG inside a page: text stays text, and axes take the colour of the page, light or dark."""

# the stubs of matplotlib leave the type of keyword arguments open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# matplotlib knows no currentColor: this one is replaced in its output
INK = "#123456"
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#64748b")
FEW = 40

Numbers = Sequence[float]


def curve(title: str, steps: Numbers, values: Numbers) -> str:
    """One line; its points are marked while they are few. NaN leaves a gap."""
    figure, axes = _new_figure()
    axes.plot(steps, values, color=COLORS[0], marker="o" if len(steps) < FEW else "", markersize=3)
    return _as_html(figure, title)


def lines(title: str, steps: Numbers, parts: Sequence[tuple[str, Numbers]]) -> str:
    """Several named curves; NaN leaves a gap, which a mark on each side makes visible."""
    figure, axes = _new_figure()
    marker = "o" if len(steps) < FEW else ""
    for color, (name, values) in zip(COLORS, parts, strict=False):
        axes.plot(steps, values, color=color, marker=marker, markersize=3, label=name)
    _legend(axes, len(parts))
    return _as_html(figure, title)


def spread(title: str, steps: Numbers, values: Numbers, margins: Numbers) -> str:
    """A curve between value - margin and value + margin."""
    figure, axes = _new_figure()
    axes.plot(steps, values, color=COLORS[0], marker="o" if len(steps) < FEW else "", markersize=3)
    below = [value - margin for value, margin in zip(values, margins, strict=True)]
    above = [value + margin for value, margin in zip(values, margins, strict=True)]
    axes.fill_between(steps, below, above, color=COLORS[0], alpha=0.2, linewidth=0)
    return _as_html(figure, title)


def histogram(title: str, parts: Sequence[tuple[str, Numbers]], *, unit: str) -> str:
    """Shares of each named part over the same bins."""
    figure, axes = _new_figure()
    longest = max(max(values) for _, values in parts)
    # a bin a value while there are few, or some bins would get two of them and others one
    count = int(longest) + 1 if longest < 20 else 20
    bins = [i - 0.5 if longest < 20 else longest * i / count for i in range(count + 1)]
    for color, (name, values) in zip(COLORS, parts, strict=False):
        weights = [1 / len(values)] * len(values)
        axes.hist(values, bins=bins, weights=weights, color=color, alpha=0.55, label=name)
    axes.set_xlabel(unit, color=INK)
    _legend(axes, len(parts))
    return _as_html(figure, title)


def stack(title: str, steps: Numbers, parts: Sequence[tuple[str, Numbers]]) -> str:
    """Named parts on top of each other."""
    figure, axes = _new_figure()
    axes.stackplot(steps, [values for _, values in parts], labels=[name for name, _ in parts], colors=COLORS)
    _legend(axes, len(parts))
    return _as_html(figure, title)


def intervals(title: str, steps: Numbers, values: Numbers, bounds: Sequence[tuple[float, float]]) -> str:
    """Points with the bounds of each."""
    figure, axes = _new_figure()
    below = [value - low for value, (low, _) in zip(values, bounds, strict=True)]
    above = [high - value for value, (_, high) in zip(values, bounds, strict=True)]
    axes.errorbar(steps, values, [below, above], fmt="o-", capsize=3, color=COLORS[0])
    return _as_html(figure, title)


class Band(NamedTuple):
    """A named curve with bounds, which are the curve itself where there is one run."""

    label: str
    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def bands(title: str, curves: Sequence[Band]) -> str:
    """Curves of several runs on one pair of axes, each in the colour of its place; no legend."""
    figure, axes = _new_figure()
    for i, band in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        # beyond the colours there are, a broken line tells two runs apart
        style = ("-", "--", ":")[i // len(COLORS) % 3]
        marker = "o" if len(band.steps) < FEW else ""
        axes.plot(band.steps, band.mean, style, color=color, marker=marker, markersize=3)
        if tuple(band.low) != tuple(band.high):
            axes.fill_between(band.steps, band.low, band.high, color=color, alpha=0.2, linewidth=0)
    return _as_html(figure, title)


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", color=INK)
    return figure, axes


def _legend(axes: Axes, columns: int) -> None:
    # more than four side by side would be wider than the figure
    columns = columns if columns <= 4 else 3
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, labelcolor=INK)


def _as_html(figure: Figure, title: str) -> str:
    """The drawing as part of the page: its text is text, and takes the colour of the page."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().replace(INK, "currentColor")
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
