"""Feedback in hindsight with SmolLM2: shown conversations first, then online DPO on ratings of two kinds.

Three models are measured on the held-out customers, whatever they have learned from: what the customer is
content with before they know what they bought (the rating with `feedback: immediate`), and what the purchase
was worth (`utility`, which is the rating with `feedback: oracle`).

    python -m benchmarks.market_run --runs FOLDER --out FILE.json --figure docs/market_smollm2.png
    python -m benchmarks.market_run --table benchmarks/results/cpu-2core/market.json --figure docs/market.png

The second draws what benchmarks/market.py has written. Runs and evaluations that are finished in FOLDER are
read from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from benchmarks.runs import ROOT, machine, read

matplotlib.use("Agg")

FEEDBACK = {"immediate": "immediate", "oracle": "hindsight"}
"""By the setting, what the figure calls it."""
SAMPLES = 8
"""Conversations with each held-out customer."""
MEASURES = {"rating": "rating before the purchase is known", "utility": "what the purchase was worth"}
Line = tuple[Sequence[float], Sequence[float]]
"""Values at the start and at the end, and half of the 95 % interval of each."""


def rlhf(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "rlhf", *words], check=True, cwd=ROOT)


def train(folder: Path) -> None:
    """The three runs, unless they are finished."""
    runs: dict[str, list[str]] = {"sft": ["configs/market_sft.yaml"]}
    for name in FEEDBACK:
        settings = [f"model.path={folder}/sft/model", f"environment.params.feedback={name}"]
        runs[name] = ["configs/market.yaml", *settings]
    for name, words in runs.items():
        if not (folder / name / "report.html").is_file():
            rlhf("train", *words, f"run_dir={folder / name}")


def measured(folder: Path, name: str) -> dict[str, Any]:
    """Rating and utility of a model on the held-out customers; the interval is over customers."""
    file = folder / f"eval-{name}.json"
    if not file.is_file():
        settings = ["environment.params.feedback=immediate", f"eval.samples={SAMPLES}", "--out", str(file)]
        rlhf("eval", f"{folder / name}/model", "--config", "configs/market.yaml", *settings)
    groups = [record["completions"] for record in json.loads(file.read_text())["records"]]
    found: dict[str, Any] = {"customers": len(groups), "conversations": sum(map(len, groups))}
    for measure, objective in (("rating", "Market"), ("utility", "utility")):
        means = [statistics.fmean(c["objectives"][objective] for c in group) for group in groups]
        half = 1.96 * statistics.stdev(means) / len(means) ** 0.5
        found[measure] = [round(statistics.fmean(means), 4), round(half, 4)]
        found[f"{measure} by customer"] = [round(mean, 4) for mean in means]
    worth = [c["objectives"]["utility"] for group in groups for c in group]
    bought = [utility for utility in worth if utility != 0.0]
    found["bought"] = round(len(bought) / len(worth), 4)
    found["of these what fits"] = round(sum(utility > 0.0 for utility in bought) / max(1, len(bought)), 4)
    return found


def change(before: Mapping[str, Any], after: Mapping[str, Any], measure: str) -> list[float]:
    """The mean change of the same customers, and half of its 95 % interval."""
    pairs = zip(before[f"{measure} by customer"], after[f"{measure} by customer"], strict=True)
    changes = [b - a for a, b in pairs]
    half = 1.96 * statistics.stdev(changes) / len(changes) ** 0.5
    return [round(statistics.fmean(changes), 4), round(half, 4)]


def results(folder: Path) -> dict[str, Any]:
    train(folder)
    found = {name: measured(folder, name) for name in ("sft", *FEEDBACK)}
    for name in FEEDBACK:
        steps, _ = read(folder / name)
        found[name] |= {f"change of {m}": change(found["sft"], found[name], m) for m in MEASURES}
        for key in ("reward/Market", "reward/utility", "pairs/groups"):
            found[name][key] = [round(step[key], 4) for step in steps]
        found[name]["minutes"] = round(sum(step["time/step"] for step in steps) / 60, 1)
    return {
        "command": "python -m benchmarks.market_run --runs FOLDER --out FILE.json --figure FILE.png",
        "machine": machine(),
        **found,
    }


def of_runs(found: Mapping[str, Any], measure: str) -> dict[str, list[Line]]:
    """The line of each run, from the model that both began with."""
    lines: dict[str, list[Line]] = {}
    for name, label in FEEDBACK.items():
        ends = [found["sft"][measure], found[name][measure]]
        lines[label] = [([value for value, _ in ends], [half for _, half in ends])]
    return lines


def of_table(found: Mapping[str, Any], measure: str) -> dict[str, list[Line]]:
    """The line of each seed."""
    lines: dict[str, list[Line]] = {}
    for label in FEEDBACK.values():
        both = [found[label][f"{measure} at the {when}"] for when in ("start", "end")]
        lines[label] = [(ends, (0.0, 0.0)) for ends in zip(*both, strict=True)]
    return lines


def draw(lines: Mapping[str, Mapping[str, Sequence[Line]]], title: str, file: Path) -> None:
    """A panel a measure, in which each kind of ratings goes from the start to the end."""
    figure, axes = plt.subplots(1, len(lines), figsize=(8, 3.6), layout="constrained")
    for axis, (measure, by_label) in zip(axes, lines.items(), strict=True):
        for number, (label, some) in enumerate(by_label.items()):
            for values, halves in some:
                shift = [0.02 * number, 1 + 0.02 * number]
                style: dict[str, Any] = {"marker": "o", "capsize": 3, "color": f"C{number}"}
                axis.errorbar(shift, values, yerr=halves, label=f"learned from {label} ratings", **style)
        axis.set(title=MEASURES[measure], xticks=[0, 1], xlim=(-0.3, 1.3), xticklabels=["start", "end"])
        axis.axhline(0.0, color="grey", linewidth=0.6)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    axes[0].legend(named.values(), named.keys(), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="JSON file with what the runs gave")
    parser.add_argument("--table", type=Path, help="JSON file of benchmarks.market, to draw in place of runs")
    parser.add_argument("--figure", type=Path, required=True)
    options = parser.parse_args()
    if options.table is not None:
        found, lines_of = json.loads(options.table.read_text()), of_table
        title = f"a policy that is a table, {found['seeds']} seeds"
    elif options.runs is None or options.out is None:
        parser.error("give --runs and --out, or --table")
    else:
        found, lines_of = results(options.runs.resolve()), of_runs
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        title = "SmolLM2-135M, one seed: held-out customers, 95 % intervals"
    draw({measure: lines_of(found, measure) for measure in MEASURES}, title, options.figure)


if __name__ == "__main__":
    main()
