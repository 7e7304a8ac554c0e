"""Several runs on one page: what each came to, their curves over each other, and which settings differ.

Runs that differ in nothing but seed and run folder are one line: the mean, and a band from the least to the
greatest of them.
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
from rlhf.monitoring.records import read_eval, read_groups, read_metrics
from rlhf.monitoring.report import plots
from rlhf.monitoring.report.browser import PAINT, browser
from rlhf.monitoring.report.browser import STYLE as BROWSER_STYLE
from rlhf.monitoring.report.page import PLOTS
from rlhf.monitoring.report.plots import Band
from rlhf.monitoring.report.style import STYLE
from rlhf.monitoring.report.verdict import verdict
from rlhf.monitoring.run_folder import RunFolder, RunFolderError, flat_settings

UNSAID = ("run_dir", "monitor", "checkpoint")
"""Settings that make no difference."""
ASIDE = ("seed", *UNSAID)
"""Settings that make no other experiment."""
MARK = '<meta name="generator" content="rlhf report">'


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder, read."""

    name: str
    settings: dict[str, Any]
    """By dotted key."""
    steps: list[dict[str, float]]
    evaluations: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    """Some of its completions, oldest first."""

    @property
    def experiment(self) -> tuple[tuple[str, str], ...]:
        """The same for runs that differ in seed and folder only."""
        kept = {k: v for k, v in self.settings.items() if k.split(".")[0] not in ASIDE}
        return tuple(sorted((k, json.dumps(v, sort_keys=True)) for k, v in kept.items()))


Runs = Sequence[Run]


def write_comparison(folders: Sequence[Path], target: Path) -> None:
    """Writes the page. Raises RunFolderError: a folder holds no run, or `target` is another file."""
    if target.exists() and not (target.is_file() and MARK in target.read_text(errors="replace")[:4000]):
        raise RunFolderError(f"{target} is there and is no earlier comparison; nothing was overwritten")
    if not target.parent.is_dir():
        raise RunFolderError(f"there is no folder {target.parent} to write {target.name} in")
    write_atomically(target, render([read_run(folder, folders) for folder in folders]))


def read_run(folder: Path, among: Sequence[Path] = ()) -> Run:
    """Its name is the last part of its path, or all of it where another folder has that too."""
    run = RunFolder(folder)
    if not run.metrics.is_file() and not run.evaluations.is_file():
        raise RunFolderError(f"{folder} holds no run: there is neither metrics.jsonl nor eval.json")
    alone = [other.resolve().name for other in among].count(folder.resolve().name) <= 1
    text = run.config.read_text(encoding="utf-8") if run.config.is_file() else ""
    settings = cast(dict[str, Any], yaml.safe_load(text) or {})
    name = folder.resolve().name if alone else str(folder)
    settings = dict(flat_settings(settings))
    return Run(name, settings, read_metrics(run), read_eval(run), read_groups(run.samples))


def render(runs: Runs) -> str:
    """One self-contained page."""
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
    """Runs of one experiment together, in the order given. One without settings stands alone."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.experiment or id(run), []).append(run)
    return list(groups.values())


def band_of(label: str, runs: Runs, name: str) -> Band | None:
    """The metric over steps that all runs of a group have measured; None when there are none."""
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
        "first accuracy",
        "last accuracy",
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
    said = verdict(run.evaluations, run.steps)
    return [
        str(int(run.steps[-1]["step"]) if run.steps else 0),
        f"{first[0]['accuracy']:.3f}" if first else "none",
        f"{last[0]['accuracy']:.3f}" if last else "none",
        f"{last[0]['ci_low']:.3f} to {last[0]['ci_high']:.3f}" if last else "",
        f"{seconds / 60:.1f}",
        ", ".join(f"{100 * share:.0f} %" for share in _split(run, seconds)),
        {"rose": "learned", "fell": "got worse", "unchanged": "no measurable change"}.get(
            said.outcome, "not known"
        ),
    ]


def _split(run: Run, seconds: float) -> list[float]:
    """Shares of the time of all steps."""
    parts = ("time/rollout", "time/reward", "time/learn", "time/sync")
    return [sum(s.get(name, 0.0) for s in run.steps) / seconds for name in parts] if seconds else []


def _curves(groups: Sequence[Runs], names: Sequence[str]) -> str:
    drawn = [plots.bands(title, found) for title, found in _figures(groups, names)]
    legend = "".join(f"<span>{_swatch(i)} {escape(name)}</span>" for i, name in enumerate(names))
    several = any(len(group) > 1 for group in groups)
    note = "Lines are means over seeds, bands from the least to the greatest." if several else ""
    return (
        f'<h2>Curves</h2><p class="legend">{legend}</p>'
        + (f'<p class="note">{note}</p>' if note else "")
        + f'<div class="plots">{"".join(drawn)}</div>'
    )


def _figures(groups: Sequence[Runs], names: Sequence[str]) -> Iterator[tuple[str, list[Band]]]:
    held_out: list[Band | None] = []
    for group, label in zip(groups, names, strict=True):
        held_out.append(_band(label, [{e["step"]: e["accuracy"] for e in run.evaluations} for run in group]))
    yield from _if_any("Accuracy on held-out prompts", held_out, groups)
    for plot in PLOTS:
        if len(plot.names) == 1:
            found = [band_of(label, g, plot.names[0]) for g, label in zip(groups, names, strict=True)]
            yield from _if_any(plot.title, found, groups)
    seconds = [band_of(label, g, "time/step") for g, label in zip(groups, names, strict=True)]
    yield from _if_any("Seconds a step", seconds, groups)


def _if_any(
    title: str, found: Sequence[Band | None], groups: Sequence[Runs]
) -> Iterator[tuple[str, list[Band]]]:
    """A run that did not measure it keeps its colour for the other figures."""
    if any(found):
        yield title, [band or Band(groups[i][0].name, [], [], [], []) for i, band in enumerate(found)]


def _differences(groups: Sequence[Runs], names: Sequence[str]) -> str:
    every = [group[0].settings for group in groups]
    keys = sorted({key for settings in every for key in settings if key.split(".")[0] not in UNSAID})
    differing = [key for key in keys if len({json.dumps(s.get(key)) for s in every}) > 1]
    if len(groups) < 2 or not differing:
        return '<h2>Settings</h2><p class="note">They differ in nothing but seeds and folders.</p>'
    head = "".join(f"<th>{_swatch(i)} {escape(name)}</th>" for i, name in enumerate(names))
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td>{escape(_shown(settings, key))}</td>" for settings in every)
        + "</tr>"
        for key in differing
    )
    return (
        "<h2>Settings that differ</h2>"
        f'<div class="wide"><table><tr><th>setting</th>{head}</tr>{rows}</table></div>'
    )


def _completions(runs: Runs) -> str:
    """The last groups of each run."""
    shown = [
        (run, [g for g in run.groups if g["step"] == run.groups[-1]["step"]]) for run in runs if run.groups
    ]
    if not shown:
        return ""
    parts = [f"<h3>{escape(run.name)}</h3>{browser(groups)}" for run, groups in shown]
    return f"<h2>Completions of the last step</h2>{PAINT}{''.join(parts)}"


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "not there"
    value = settings[key]
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _swatch(i: int) -> str:
    color = plots.COLORS[i % len(plots.COLORS)]
    line = ("solid", "dashed", "dotted")[i // len(plots.COLORS) % 3]
    return f'<i class="swatch" style="border-top: 3px {line} {color}"></i>'
