"""Accuracy and duration of configs/quickstart.yaml with several seeds.

Run: `python -m benchmarks.quickstart --model MODEL_FOLDER --runs FOLDER --out FILE.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.runs import ROOT, machine, read, train

CONFIG = ROOT / "configs" / "quickstart.yaml"
PHASES = ("time/step", "time/rollout", "time/reward", "time/learn", "time/sync")


def summary(run: Path, seed: int) -> dict[str, Any]:
    steps, evaluations = read(run)
    before, after = evaluations[0], evaluations[-1]
    return {
        "seed": seed,
        "accuracy_before": round(before["accuracy"], 4),
        "accuracy_after": round(after["accuracy"], 4),
        "ci_after": [round(after["ci_low"], 4), round(after["ci_high"], 4)],
        "samples": after["num_samples"],
        "reward_by_step": [round(s["reward/mean"], 3) for s in steps],
        "training_minutes": round(sum(s["time/step"] for s in steps) / 60, 2),
        "median_s": {name: round(statistics.median(s[name] for s in steps), 3) for name in PHASES},
        "peak_gib": round(max(s["memory/peak_gib"] for s in steps), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        run = options.runs / f"quickstart-{seed}"
        train(CONFIG, run, [f"seed={seed}", f"model.path={options.model}"])
        rows.append(summary(run, seed))
        print(rows[-1], flush=True)  # noqa: T201
    report = {
        "command": "python -m benchmarks.quickstart " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "accuracy_before_mean": round(statistics.mean(r["accuracy_before"] for r in rows), 4),
        "accuracy_after_mean": round(statistics.mean(r["accuracy_after"] for r in rows), 4),
        "runs": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
