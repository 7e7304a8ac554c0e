"""The page RUN/report.html: verdict, accuracy, plots of metrics, completions and configuration, as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from rlhf.monitoring.health import pairs_are_given
from rlhf.monitoring.records import Headline, headlines
from rlhf.monitoring.report import browser as report_browser
from rlhf.monitoring.report import plots
from rlhf.monitoring.report.browser import PAINT, browser, lengths_of, reward_text
from rlhf.monitoring.report.gates import gates
from rlhf.monitoring.report.style import STYLE
from rlhf.monitoring.report.verdict import Verdict

Steps = Sequence[Mapping[str, float]]
Records = Sequence[Mapping[str, Any]]


# buckets of the metrics budget/size_* and budget/solved_*, and their labels
SOLVED = {"0": "0 %", "0_20": "to 20 %", "20_80": "to 80 %", "80_100": "below 100 %", "100": "100 %"}


class Plot(NamedTuple):
    """One figure: its title, and the metrics it shows as curves."""

    title: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    whole: bool = True
    """Whether several metrics are parts of a sum, to be stacked."""
    spread: str = ""
    """A metric that is drawn as a margin around the only curve."""


OF_PAIRS = (
    Plot("Loss of the pairs", ("pairs/loss",)),
    Plot("Share of the pairs whose chosen completion is ahead", ("pairs/accuracy",)),
    Plot("Margin of chosen over rejected", ("pairs/margin",)),
    Plot(
        "Log-ratio to the reference, nats a completion",
        ("pairs/chosen_logratio", "pairs/rejected_logratio"),
        ("chosen", "rejected"),
        whole=False,
    ),
    Plot(
        "Log-probability, nats a token",
        ("pairs/chosen_logprob", "pairs/rejected_logprob"),
        ("chosen", "rejected"),
        whole=False,
    ),
)
PLOTS = (
    *OF_PAIRS,
    Plot("Reward, mean of a step", ("reward/mean",), spread="reward/std"),
    Plot(
        "KL to the reference, nats a token",
        ("kl/ref", "kl/exact", "kl/forward"),
        ("estimated", "exact", "exact, forward"),
        whole=False,
    ),
    Plot("Entropy, nats a token", ("entropy",)),
    Plot("Length of completions, tokens", ("length/mean",)),
    Plot("Share of completions cut at the token limit", ("length/truncated",)),
    Plot("Norm of the gradient", ("grad_norm",)),
    Plot("Engine against learner (k3), nats a token", ("mismatch/k3",)),
    Plot("Share of tokens clipped", ("clip_fraction",)),
    Plot("Share of rollouts in groups whose rewards differ", ("budget/effective_ratio",)),
    Plot(
        "Rollouts of a prompt, by the share of them that was correct",
        tuple(f"budget/size_{bucket}" for bucket in SOLVED),
        tuple(SOLVED.values()),
        whole=False,
    ),
    Plot(
        "Share of prompts, by the share of their rollouts that was correct",
        tuple(f"budget/solved_{bucket}" for bucket in SOLVED),
        tuple(SOLVED.values()),
    ),
    Plot("Seconds a step", ("time/rollout", "time/reward", "time/learn", "time/sync")),
    Plot("Tokens sampled a second", ("throughput/tokens_per_second",)),
)
# plots of what the policy samples, by their first metric; where pairs are given it would be that of the data
OF_ROLLOUTS = (
    "reward/mean",
    "length/mean",
    "length/truncated",
    "mismatch/k3",
    "clip_fraction",
    "budget/effective_ratio",
    "budget/size_0",
    "budget/solved_0",
    "throughput/tokens_per_second",
)


def render(
    title: str, outcome: Verdict, *, evaluations: Records, steps: Steps, groups: Records, config: str
) -> str:
    """The page. Plots whose metrics were not recorded are left out and listed by name.

    `groups`: some of the groups in RUN/samples.jsonl, oldest first.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        _verdict(outcome),
        _facts(steps),
        *(_held_out(figure, evaluations) for figure in headlines(evaluations)),
        _curves(steps, groups),
        gates(groups),
        _evaluated(evaluations),
        f"<h2>Completions in training</h2>{PAINT}{browser(groups)}" if groups else "",
        f"<h2>Configuration</h2><pre>{escape(config)}</pre>" if config else "",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{report_browser.STYLE}</style>\n"
        + "\n".join(section for section in sections if section)
        + "\n</html>\n"
    )


def _verdict(outcome: Verdict) -> str:
    page = f'<p class="verdict {outcome.outcome}">{escape(outcome.sentence)}</p>'
    if outcome.reasons:
        items = "".join(f"<li>{escape(reason)}</li>" for reason in outcome.reasons)
        page += f'<ul class="reasons">{items}</ul>'
    return page


def _facts(steps: Steps) -> str:
    if not steps:
        return '<p class="note">No step was recorded.</p>'
    facts = [f"{len(steps)} steps"]
    seconds = [values["time/step"] for values in steps if "time/step" in values]
    if seconds:
        facts += [
            f"{sum(seconds) / 60:.1f} minutes of training",
            f"{sum(seconds) / len(seconds):.1f} s a step",
        ]
    peaks = [values["memory/peak_gib"] for values in steps if "memory/peak_gib" in values]
    if peaks:
        facts.append(f"{max(peaks):.1f} GiB of memory at the peak")
    return f'<p class="note">{", ".join(facts)}</p>'


def _held_out(shown: Headline, evaluations: Records) -> str:
    """One figure of all evaluations that have it: a table, and a plot of more than two."""
    evaluations = [e for e in evaluations if shown.is_in(e)]
    title = shown.word.capitalize()
    figures = [shown.of(e) for e in evaluations]
    heads = ["after step", shown.word, "95% interval", "pairs" if shown.of_pairs else "samples"]
    rows = [
        [str(e["step"]), f"{value:.3f}", f"{low:.3f} to {high:.3f}", shown.count(e).split()[0]]
        for e, (value, low, high) in zip(evaluations, figures, strict=True)
    ]
    if shown.of_pairs:
        heads += PAIR_COLUMNS.values()
        rows = [[*row, *_pair_cells(e["pairs"])] for row, e in zip(rows, evaluations, strict=True)]
    page = f"<h2>{title} on held-out {'pairs' if shown.of_pairs else 'prompts'}</h2>{_table(heads, rows)}"
    if len(evaluations) > 2:
        steps, values = [e["step"] for e in evaluations], [value for value, _, _ in figures]
        bounds = [(low, high) for _, low, high in figures]
        drawn = plots.intervals(f"{title}, 95% interval", steps, values, bounds)
        page += f'<div class="plots">{drawn}</div>'
    return page


# further columns of the table of held-out pairs, by their keys in RUN/eval.json
PAIR_COLUMNS = {
    "margin": "margin, nats",
    "accuracy_logprob": "by log-probability",
    "accuracy_per_token": "by that a token",
    "accuracy_reference": "the reference's",
    "flipped": "its wrong ones now right",
    "idealised": "optimum of DPO",
    "topk_mass": "mass of the top 10 tokens",
    "topk_entropy": "their entropy, nats",
}


def _pair_cells(pairs: Mapping[str, float | None]) -> list[str]:
    return ["" if (value := pairs[key]) is None else f"{value:.3f}" for key in PAIR_COLUMNS]


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _evaluated(evaluations: Records) -> str:
    """Each prompt once, with the completions of the first and the last evaluation."""
    completions: dict[str, list[str]] = {}
    judged = any(figure.word == "accuracy" for figure in headlines(evaluations))
    for e in [*evaluations[:1], *evaluations[1:][-1:]]:
        for sample in e["samples"]:
            head = f"after step {e['step']}: {reward_text(sample)}"
            if judged:
                word = "correct" if sample["right"] else "wrong"
                head = f'after step {e["step"]}: <span class="{word}">{word}</span>, {reward_text(sample)}'
            completions.setdefault(sample["prompt"], []).append(_completion(head, sample["completion"]))
    return _questions("Completions of held-out prompts", completions.items())


def _questions(title: str, questions: Iterable[tuple[str, list[str]]]) -> str:
    page = "".join(
        f'<div class="question">{escape(question)}</div><div class="completions">{"".join(completions)}</div>'
        for question, completions in questions
    )
    return f"<h2>{title}</h2>{page}" if page else ""


def _completion(head: str, text: str) -> str:
    return f"<div><small>{head}</small><blockquote>{escape(text)}</blockquote></div>"


def _curves(steps: Steps, groups: Records) -> str:
    if not steps:
        return ""
    drawn: list[str] = []
    missing: list[str] = []
    for plot in plots_of(steps):
        labels = plot.labels or [name.partition("/")[2] for name in plot.names]
        named = [
            (name, label)
            for name, label in zip(plot.names, labels, strict=True)
            if any(name in values for values in steps)
        ]
        if named:
            drawn.append(_draw(plot, named, steps))
        else:
            missing.append(plot.title)
    drawn += _lengths(groups)
    page = f'<h2>Training</h2><div class="plots">{"".join(drawn)}</div>'
    if missing:
        page += f'<p class="note">Not recorded in this run: {escape("; ".join(missing))}.</p>'
    return page


def plots_of(steps: Steps) -> list[Plot]:
    """The plots that fit a run: those of pairs where it compares some, those of rollouts where it has any."""
    unfit = OF_ROLLOUTS if any(map(pairs_are_given, steps)) else ()
    pairs = any("pairs/loss" in values for values in steps)
    return [plot for plot in PLOTS if (pairs or plot not in OF_PAIRS) and plot.names[0] not in unfit]


def _draw(plot: Plot, named: Sequence[tuple[str, str]], steps: Steps) -> str:
    numbers = [values["step"] for values in steps]
    gap = math.nan if len(named) == 1 or not plot.whole else 0.0
    parts = [(label, [values.get(name, gap) for values in steps]) for name, label in named]
    if len(parts) == 1 and plot.spread:
        margins = [values.get(plot.spread, math.nan) for values in steps]
        return plots.spread(f"{plot.title}, and its spread in a group", numbers, parts[0][1], margins)
    if len(parts) == 1:
        return plots.curve(plot.title, numbers, parts[0][1])
    return (plots.stack if plot.whole else plots.lines)(plot.title, numbers, parts)


def _lengths(groups: Records) -> list[str]:
    """Histograms of the recorded completions' lengths in the first and in the second half of the run."""
    half = len(groups) // 2
    parts = [("first half", lengths_of(groups[:half])), ("second half", lengths_of(groups[half:]))]
    found = [(name, values) for name, values in parts if values]
    return [plots.histogram("Lengths of the recorded completions", found, unit="tokens")] if found else []
