"""Uniform and knapsack budgets in real runs of configs/knapsack.yaml, compared at equal numbers of rollouts.

Every arm and seed is one run in a folder of its own; finished runs are not repeated. Reported against the
number of rollouts: the share of rollouts in groups with both outcomes (`budget/effective_ratio`), the
reward, and held-out accuracy before, during and after. The plot has the mean of the seeds and the range
between them, the first two averaged over twelfths of the run.

    knapsack   rates of the last 16 samples, from 8 on, as in the paper: uniform until a prompt was seen
    prior      the same with a Beta(1, 1) prior
    probes     two completions a prompt first, then the rest by the posterior, in every step

Run: `python -m benchmarks.knapsack_run --model MODEL_FOLDER --runs FOLDER --out FILE.json --plot FILE.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from benchmarks.runs import ROOT, Records, machine, read, train

matplotlib.use("Agg")

ARMS = {
    "uniform": ["budget.rule=uniform"],
    "knapsack": ["budget.rule=knapsack"],
    "prior": ["budget.rule=knapsack", "budget.prior=1"],
    "probes": ["budget.rule=knapsack", "budget.prior=1", "budget.probes=2"],
}
CURVES = {"budget/effective_ratio": "rollouts in mixed groups", "reward/mean": "reward"}


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> tuple[Records, Records]:
    run = options.runs / f"{arm}-{seed}"
    train(options.config, run, [f"seed={seed}", f"model.path={options.model}", *ARMS[arm], *options.set])
    return read(run)


def summary(arm: str, runs: list[tuple[Records, Records]]) -> dict[str, Any]:
    finals = [evaluations[-1]["accuracy"] for _, evaluations in runs]
    later = [[s["budget/effective_ratio"] for s in steps[len(steps) // 4 :]] for steps, _ in runs]
    return {
        "arm": arm,
        "seeds": len(runs),
        "rollouts": [int(sum(s["rollout/samples"] for s in steps)) for steps, _ in runs],
        "effective_ratio_after_first_quarter": [round(statistics.mean(r), 4) for r in later],
        "accuracy_before": [round(evaluations[0]["accuracy"], 4) for _, evaluations in runs],
        "accuracy_after": [round(a, 4) for a in finals],
        "accuracy_after_mean": round(statistics.mean(finals), 4),
        "accuracy_after_stdev": round(statistics.stdev(finals), 4) if len(finals) > 1 else None,
    }


def draw(results: dict[str, list[tuple[Records, Records]]], file: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for arm, runs in results.items():
        used = [sum(s["rollout/samples"] for s in runs[0][0][: i + 1]) for i in range(len(runs[0][0]))]
        for axis, (name, label) in zip(axes, CURVES.items(), strict=False):
            values = [smooth([s[name] for s in steps]) for steps, _ in runs]
            band(axis, smooth(used), values, arm)
            axis.set(xlabel="rollouts", title=label)
        at = [0 if e["step"] == 0 else used[e["step"] - 1] for e in runs[0][1]]
        band(axes[2], at, [[e["accuracy"] for e in evaluations] for _, evaluations in runs], arm)
    axes[2].set(xlabel="rollouts", title="held-out accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(results))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def smooth(values: Sequence[float], points: int = 12) -> list[float]:
    """Means over equal parts of the run: a step's value depends on the few prompts it happens to draw."""
    edges = [len(values) * i // points for i in range(points + 1)]
    return [statistics.mean(values[a:b]) for a, b in pairwise(edges)]


def band(axis: Any, x: Sequence[float], curves: list[list[float]], label: str) -> None:
    columns = list(zip(*curves, strict=True))
    (line,) = axis.plot(x, [statistics.mean(c) for c in columns], label=label)
    axis.fill_between(
        x, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "knapsack.yaml")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    # all arms of one seed before the next, so that the results are comparable if the time runs out
    runs = {(arm, seed): run_arm(arm, seed, options) for seed in options.seeds for arm in options.arms}
    results = {arm: [runs[arm, seed] for seed in options.seeds] for arm in options.arms}
    report = {
        "command": "python -m benchmarks.knapsack_run " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "arms": [summary(arm, those) for arm, those in results.items()],
    }
    print(json.dumps(report["arms"], indent=1))  # noqa: T201
    if options.plot:
        draw(results, options.plot)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
