"""Figures of a report as SVG, drawn by matplotlib: curves, bands, stacks, histograms, intervals."""

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

# a placeholder: matplotlib cannot write currentColor, so this colour is replaced by it in the SVG
INK = "#123456"
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#64748b")
FEW = 40
"""Curves with fewer steps than this get a mark at each."""

Numbers = Sequence[float]


def curve(title: str, steps: Numbers, values: Numbers) -> str:
    """One curve. NaN leaves a gap."""
    figure, axes = _new_figure()
    axes.plot(steps, values, color=COLORS[0], marker="o" if len(steps) < FEW else "", markersize=3)
    return _as_html(figure, title)


def lines(title: str, steps: Numbers, parts: Sequence[tuple[str, Numbers]]) -> str:
    """Several named curves. NaN leaves a gap."""
    figure, axes = _new_figure()
    marker = "o" if len(steps) < FEW else ""
    for color, (name, values) in zip(COLORS, parts, strict=False):
        axes.plot(steps, values, color=color, marker=marker, markersize=3, label=name)
    _legend(axes, len(parts))
    return _as_html(figure, title)


def spread(title: str, steps: Numbers, values: Numbers, margins: Numbers) -> str:
    """A curve and the area from value - margin to value + margin."""
    figure, axes = _new_figure()
    axes.plot(steps, values, color=COLORS[0], marker="o" if len(steps) < FEW else "", markersize=3)
    below = [value - margin for value, margin in zip(values, margins, strict=True)]
    above = [value + margin for value, margin in zip(values, margins, strict=True)]
    axes.fill_between(steps, below, above, color=COLORS[0], alpha=0.2, linewidth=0)
    return _as_html(figure, title)


def histogram(title: str, parts: Sequence[tuple[str, Numbers]], *, unit: str) -> str:
    """A histogram of each named part over the same bins, as shares of the part."""
    figure, axes = _new_figure()
    longest = max(max(values) for _, values in parts)
    # one bin for each value while there are few values: bins of other widths would hold one or two of them
    count = int(longest) + 1 if longest < 20 else 20
    bins = [i - 0.5 if longest < 20 else longest * i / count for i in range(count + 1)]
    for color, (name, values) in zip(COLORS, parts, strict=False):
        weights = [1 / len(values)] * len(values)
        axes.hist(values, bins=bins, weights=weights, color=color, alpha=0.55, label=name)
    axes.set_xlabel(unit, color=INK)
    _legend(axes, len(parts))
    return _as_html(figure, title)


def stack(title: str, steps: Numbers, parts: Sequence[tuple[str, Numbers]]) -> str:
    """Named parts stacked on each other."""
    figure, axes = _new_figure()
    axes.stackplot(steps, [values for _, values in parts], labels=[name for name, _ in parts], colors=COLORS)
    _legend(axes, len(parts))
    return _as_html(figure, title)


def shares(title: str, rows: Sequence[str], parts: Sequence[tuple[str, Numbers]]) -> str:
    """A bar for each row, the first one on top, with the named parts of it end to end."""
    figure, axes = _new_figure()
    figure.set_size_inches(5.6, 1.2 + 0.22 * len(rows))
    places = list(range(len(rows), 0, -1))
    left = [0.0] * len(rows)
    for i, (name, values) in enumerate(parts):
        # when the colours are used up, they come again paler
        axes.barh(
            places,
            values,
            left=left,
            color=COLORS[i % len(COLORS)],
            alpha=0.7 ** (i // len(COLORS)),
            label=name,
        )
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(places, list(rows))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("weight", color=INK)
    # above the figure: the axes are narrow, as the names of the rows are long
    figure.legend(loc="outside upper center", ncols=min(3, len(parts)), frameon=False, labelcolor=INK)
    return _as_html(figure, title)


def intervals(title: str, steps: Numbers, values: Numbers, bounds: Sequence[tuple[float, float]]) -> str:
    """A curve whose points have error bars, from the lower to the upper bound of each."""
    figure, axes = _new_figure()
    below = [value - low for value, (low, _) in zip(values, bounds, strict=True)]
    above = [high - value for value, (_, high) in zip(values, bounds, strict=True)]
    axes.errorbar(steps, values, [below, above], fmt="o-", capsize=3, color=COLORS[0])
    return _as_html(figure, title)


class Band(NamedTuple):
    """A curve of a group of runs: mean, smallest and largest value. With one run all three are equal."""

    label: str
    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def bands(title: str, curves: Sequence[Band]) -> str:
    """Curves of several groups of runs on the same axes, coloured by their order; without a legend."""
    figure, axes = _new_figure()
    for i, band in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        # when the colours are used up, dashed and dotted lines distinguish the runs
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
    """The figure as SVG: text stays text, and text and axes take the colour of the page."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().replace(INK, "currentColor")
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
