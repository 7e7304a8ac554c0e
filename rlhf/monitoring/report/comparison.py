"""The comparison of several runs on one HTML page: outcomes, curves, settings that differ, completions.

Runs that differ only in `SAME_EXPERIMENT` settings (seed, run folder) are one curve: their mean, and a band
from the smallest to the largest of their values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import yaml

from rlhf.files import write_atomically
from rlhf.monitoring.records import Headline, headlines, read_eval, read_groups, read_metrics
from rlhf.monitoring.report import plots
from rlhf.monitoring.report.browser import PAINT, browser
from rlhf.monitoring.report.browser import STYLE as BROWSER_STYLE
from rlhf.monitoring.report.page import PLOTS, plots_of
from rlhf.monitoring.report.plots import Band
from rlhf.monitoring.report.style import STYLE
from rlhf.monitoring.report.verdict import verdict
from rlhf.monitoring.run_folder import RunFolder, RunFolderError, flat_settings

NO_EFFECT = ("run_dir", "monitor", "checkpoint")
"""Settings that do not change what a run learns; the table of differing settings leaves them out."""
SAME_EXPERIMENT = ("seed", *NO_EFFECT)
"""Settings that may differ within one experiment: runs that differ in nothing else share a curve."""
MARK = '<meta name="generator" content="rlhf report">'
"""The line by which an earlier comparison is recognised; only such a file is overwritten."""


@dataclass(frozen=True, slots=True)
class Run:
    """What was read from a run folder."""

    name: str
    settings: dict[str, Any]
    """The value of each setting, by its dotted key."""
    steps: list[dict[str, float]]
    evaluations: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    """Some of the recorded groups, oldest first."""

    @property
    def experiment(self) -> tuple[tuple[str, str], ...]:
        """The settings that define the experiment: equal for runs that differ in `SAME_EXPERIMENT` only."""
        kept = {k: v for k, v in self.settings.items() if k.split(".")[0] not in SAME_EXPERIMENT}
        return tuple(sorted((k, json.dumps(v, sort_keys=True)) for k, v in kept.items()))


Runs = Sequence[Run]


def write_comparison(folders: Sequence[Path], target: Path) -> None:
    """Writes the page.

    Raises RunFolderError when a folder holds no run, when `target` exists and is no earlier comparison, or
    when the folder of `target` does not exist.
    """
    if target.exists() and not (target.is_file() and MARK in target.read_text(errors="replace")[:4000]):
        raise RunFolderError(
            f"{target} exists and is not an earlier comparison; nothing was overwritten, name another file"
        )
    if not target.parent.is_dir():
        raise RunFolderError(
            f"there is no folder {target.parent} to write {target.name} in; create it, or name another file"
        )
    write_atomically(target, render([read_run(folder, folders) for folder in folders]))


def read_run(folder: Path, compared: Sequence[Path] = ()) -> Run:
    """Reads a run folder. The run is named by the last part of its path, or by all of it if another folder in
    `compared` has the same last part. Raises RunFolderError when the folder holds no run.
    """
    run = RunFolder(folder)
    if not run.metrics.is_file() and not run.evaluations.is_file():
        raise RunFolderError(f"{folder} holds no run: there is neither metrics.jsonl nor eval.json")
    is_unique = [other.resolve().name for other in compared].count(folder.resolve().name) <= 1
    settings = cast(dict[str, Any], yaml.safe_load(run.settings() or "") or {})
    name = folder.resolve().name if is_unique else str(folder)
    settings = dict(flat_settings(settings))
    return Run(name, settings, read_metrics(run), read_eval(run), read_groups(run.samples))


def render(runs: Runs) -> str:
    """The page, with everything it needs in one file."""
    groups = grouped(runs)
    names = [_label(group) for group in groups]
    title = " against ".join(names) if len(names) < 4 else f"{len(runs)} runs"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _outcomes(groups, names),
        _curves(groups, names),
        _differences(groups, names),
        _completions(runs),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{BROWSER_STYLE}</style>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )


def grouped(runs: Runs) -> list[list[Run]]:
    """Groups of runs of one experiment, in the order given. A run without settings is a group of its own."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.experiment or id(run), []).append(run)
    return list(groups.values())


def band_of(label: str, runs: Runs, name: str) -> Band | None:
    """The metric `name` at the steps at which all runs of a group have it; None if there is no such step."""
    series = [{int(s["step"]): s[name] for s in run.steps if name in s} for run in runs]
    return _band(label, series)


def _band(label: str, series: Sequence[Mapping[int, float]]) -> Band | None:
    steps = sorted(step for step in series[0] if all(step in values for values in series))
    if not steps:
        return None
    columns = [[values[step] for values in series] for step in steps]
    means = [math.fsum(column) / len(column) for column in columns]
    return Band(label, steps, means, [min(c) for c in columns], [max(c) for c in columns])


def _label(group: Runs) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more seeds"


def _outcomes(groups: Sequence[Runs], names: Sequence[str]) -> str:
    heads = (
        "",
        "run",
        "steps",
        "first held out",
        "last held out",
        "95% interval",
        "minutes",
        "of which rollout, reward, learn, sync",
        "verdict",
    )
    rows: list[str] = []
    for i, (group, _) in enumerate(zip(groups, names, strict=True)):
        for run in group:
            cells = [_swatch(i), escape(run.name), *map(escape, _facts(run))]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<h2>Outcomes</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _facts(run: Run) -> list[str]:
    seconds = sum(s.get("time/step", 0.0) for s in run.steps)
    first, last = run.evaluations[:1], run.evaluations[1:][-1:]
    outcome, shown = verdict(run.evaluations, run.steps).outcome, headlines(run.evaluations)
    word = shown[0].word if shown else ""
    return [
        str(int(run.steps[-1]["step"]) if run.steps else 0),
        _figures_of(first, shown) or "none",
        _figures_of(last, shown) or "none",
        _figures_of(last, shown, interval=True),
        f"{seconds / 60:.1f}",
        ", ".join(f"{100 * share:.0f} %" for share in _split(run, seconds)),
        {"rose": f"{word} rose", "fell": f"{word} fell", "unchanged": "no measurable change"}.get(
            outcome, "not known"
        ),
    ]


def _figures_of(
    evaluations: Sequence[Mapping[str, Any]], shown: Sequence[Headline], *, interval: bool = False
) -> str:
    """The figures of an evaluation, or the intervals of them, as one cell."""
    found = [(figure.word, *figure.of(e)) for e in evaluations for figure in shown if figure.is_in(e)]
    if interval:
        return "; ".join(f"{low:.3f} to {high:.3f}" for _, _, low, high in found)
    return "; ".join(f"{word} {value:.3f}" for word, value, _, _ in found)


def _split(run: Run, seconds: float) -> list[float]:
    """The shares of rollout, reward, learn and sync in the seconds of all steps."""
    parts = ("time/rollout", "time/reward", "time/learn", "time/sync")
    return [sum(s.get(name, 0.0) for s in run.steps) / seconds for name in parts] if seconds else []


def _curves(groups: Sequence[Runs], names: Sequence[str]) -> str:
    drawn = [plots.bands(title, found) for title, found in _figures(groups, names)]
    legend = "".join(f"<span>{_swatch(i)} {escape(name)}</span>" for i, name in enumerate(names))
    several = any(len(group) > 1 for group in groups)
    note = (
        "Lines are means over the seeds, bands reach from the smallest to the largest value."
        if several
        else ""
    )
    return (
        f'<h2>Curves</h2><p class="legend">{legend}</p>'
        + (f'<p class="note">{note}</p>' if note else "")
        + f'<div class="plots">{"".join(drawn)}</div>'
    )


def _figures(groups: Sequence[Runs], names: Sequence[str]) -> Iterator[tuple[str, list[Band]]]:
    for shown in headlines([e for group in groups for run in group for e in run.evaluations]):
        held_out = [
            _band(
                label,
                [{e["step"]: shown.of(e)[0] for e in run.evaluations if shown.is_in(e)} for run in group],
            )
            for group, label in zip(groups, names, strict=True)
        ]
        where = "pairs" if shown.of_pairs else "prompts"
        yield from _if_any(f"{shown.word.capitalize()} on held-out {where}", held_out, groups)
    fitting = {plot for group in groups for run in group for plot in plots_of(run.steps)}
    for plot in PLOTS:
        if len(plot.names) == 1 and plot in fitting:
            found = [band_of(label, g, plot.names[0]) for g, label in zip(groups, names, strict=True)]
            yield from _if_any(plot.title, found, groups)
    seconds = [band_of(label, g, "time/step") for g, label in zip(groups, names, strict=True)]
    yield from _if_any("Seconds a step", seconds, groups)


def _if_any(
    title: str, found: Sequence[Band | None], groups: Sequence[Runs]
) -> Iterator[tuple[str, list[Band]]]:
    """A figure, unless no group has the metric. Groups without it get an empty curve, for the colours."""
    if any(found):
        yield title, [band or Band(groups[i][0].name, [], [], [], []) for i, band in enumerate(found)]


def _differences(groups: Sequence[Runs], names: Sequence[str]) -> str:
    all_settings = [group[0].settings for group in groups]
    keys = sorted(
        {key for settings in all_settings for key in settings if key.split(".")[0] not in NO_EFFECT}
    )
    differing = [key for key in keys if len({json.dumps(s.get(key)) for s in all_settings}) > 1]
    if len(groups) < 2 or not differing:
        note = "The runs differ only in seed, run folder, monitoring or checkpoints."
        return f'<h2>Settings</h2><p class="note">{note}</p>'
    head = "".join(f"<th>{_swatch(i)} {escape(name)}</th>" for i, name in enumerate(names))
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td>{escape(_shown(settings, key))}</td>" for settings in all_settings)
        + "</tr>"
        for key in differing
    )
    return (
        "<h2>Settings that differ</h2>"
        f'<div class="wide"><table><tr><th>setting</th>{head}</tr>{rows}</table></div>'
    )


def _completions(runs: Runs) -> str:
    """The recorded groups of the last step of each run."""
    shown = [
        (run, [g for g in run.groups if g["step"] == run.groups[-1]["step"]]) for run in runs if run.groups
    ]
    if not shown:
        return ""
    parts = [f"<h3>{escape(run.name)}</h3>{browser(groups)}" for run, groups in shown]
    return f"<h2>Completions of the last step</h2>{PAINT}{''.join(parts)}"


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "no such setting"
    value = settings[key]
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _swatch(i: int) -> str:
    color = plots.COLORS[i % len(plots.COLORS)]
    line = ("solid", "dashed", "dotted")[i // len(plots.COLORS) % 3]
    return f'<i class="swatch" style="border-top: 3px {line} {color}"></i>'
