"""configs/dpo.yaml with several seeds: accuracy on held-out pairs, and the rule's truth on samples.

Run: `python -m benchmarks.preference_runs --model MODEL --runs FOLDER --out FILE.json --figure FILE.png`.
A seed is the order of the pairs and the sampling of the evaluations; the held-out pairs and prompts are the
same. Runs that are finished in FOLDER are read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.runs import ROOT, machine, read, train

CONFIG = ROOT / "configs" / "dpo.yaml"
EVERY = 20
"""Steps between evaluations."""
PAIRS = ("accuracy", "accuracy_logprob", "accuracy_reference", "flipped", "margin", "topk_entropy")
CURVES = ("pairs/margin", "pairs/chosen_logratio", "pairs/rejected_logratio")


def summary(run: Path, seed: int) -> dict[str, Any]:
    """One run: evaluations, and the curves of its steps."""
    steps, evaluations = read(run)
    return {
        "seed": seed,
        "evaluations": [
            {
                "step": record["step"],
                "pairs": {name: rounded(record["pairs"][name]) for name in PAIRS},
                "pairs_ci": [rounded(record["pairs"][end]) for end in ("ci_low", "ci_high")],
                "truth": rounded(record["reward"]),
                "truth_ci": [rounded(record[end]) for end in ("reward_low", "reward_high")],
                "correct": rounded(record["accuracy"]),
            }
            for record in evaluations
        ],
        "curves": {name: [rounded(step[name]) for step in steps] for name in CURVES},
        "training_minutes": round(sum(step["time/step"] for step in steps) / 60, 2),
        "step_s": round(statistics.median(step["time/step"] for step in steps), 2),
        "peak_gib": round(max(step["memory/peak_gib"] for step in steps), 2),
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def mean_and_spread(rows: list[dict[str, Any]], place: int) -> dict[str, Any]:
    """The mean over seeds of the first or last evaluation, and the smallest and largest value."""
    taken = [row["evaluations"][place] for row in rows]
    values = {
        "pair_accuracy": [record["pairs"]["accuracy_logprob"] for record in taken],
        "pair_accuracy_implied": [record["pairs"]["accuracy"] for record in taken],
        "truth": [record["truth"] for record in taken],
        "correct": [record["correct"] for record in taken],
    }
    return {name: [round(statistics.mean(v), 4), min(v), max(v)] for name, v in values.items()}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy on held-out pairs, truth of samples, and what margins are made of."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for row in rows:
        label, steps = f"seed {row['seed']}", [record["step"] for record in row["evaluations"]]
        pairs = [record["pairs"]["accuracy_logprob"] for record in row["evaluations"]]
        axes[0].plot(steps, pairs, marker="o", label=label)
        axes[1].plot(steps, [record["truth"] for record in row["evaluations"]], marker="o", label=label)
    axes[0].axhline(0.5, color="grey", linewidth=0.8)
    for name, color in zip(CURVES[1:], ("tab:green", "tab:red"), strict=True):
        several = [row["curves"][name] for row in rows]
        for curve in several:
            axes[2].plot(range(1, len(curve) + 1), curve, color=color, alpha=0.25, linewidth=0.8)
        means = [statistics.mean(values) for values in zip(*several, strict=True)]
        axes[2].plot(range(1, len(means) + 1), means, color=color, label=name)
    titles = (
        "held-out pairs whose chosen completion is likelier",
        "the rule's score of sampled completions",
        "log policy / reference, nats a completion",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylim(0, 1.02)
    axes[1].set_ylim(0, 1.02)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        run = options.runs / f"dpo-{seed}"
        train(CONFIG, run, [f"seed={seed}", f"model.path={options.model}", f"eval.every={EVERY}"])
        rows.append(summary(run, seed))
    report = {
        "command": "python -m benchmarks.preference_runs " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "mean_min_max_before": mean_and_spread(rows, 0),
        "mean_min_max_after": mean_and_spread(rows, -1),
        "runs": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
