"""Words in a sentence: GRPO with a clip_high that falls from 0.28 to 0.2 against constant ones.

The two-layer model, the data and the reward are those of `benchmarks.preference_words`; each step makes eight
updates from the same samples, so that the clip has something to cut. Held-out reward without noise, on 8
samples a prompt.

    python -m benchmarks.schedule --runs FOLDER --out FILE.json --figure FILE.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.advantage_weighted import base, taught
from benchmarks.preference_words import LIMIT, made_data, run
from benchmarks.runs import machine, read

STEPS, EVERY, PROMPTS, SEEDS = 40, 10, 8, (0, 1, 2)
ARMS: dict[str, Any] = {
    "0.28": 0.28,
    "0.28 to 0.2": {"start": 0.28, "end": 0.2, "shape": "linear"},
    "0.2": 0.2,
}


def settings_of(arm: str, model: Path, data: Path, seed: int, lr: float) -> dict[str, Any]:
    shared = base(model, data, steps=STEPS, prompts=PROMPTS, limit=LIMIT, lr=lr)
    del shared["prompt_value"]
    shared["model"]["dtype"] = "float32"
    files = {"train": str(data / "best.jsonl"), "eval": str(data / "eval.jsonl")}
    shared["data"] = files | {"max_prompt_tokens": 80}
    shared["rollout"]["group_size"] = 8
    shared["learner"] |= {"schedule": "constant", "epochs": 4, "minibatches": 2}
    algorithm = {"name": "grpo", "clip_low": 0.2, "clip_high": ARMS[arm], "kl": {"coef": 0.0}}
    return shared | {"algorithm": algorithm, "seed": seed, "eval": {"every": EVERY, "samples": 8}}


def measured(arm: str, seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    curve, (steps, _) = run(settings, folder), read(folder)
    names = ("entropy", "clip_fraction/high", "ratio/max")
    series = {name: [round(step[name], 5) for step in steps] for name in names}
    return {"arm": arm, "seed": seed, "steps": curve["steps"], "reward": curve["reward"]} | series


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Held-out reward, entropy and what the upper bound cuts: a thin line a seed, thick their mean."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, name in zip(axes, ("reward", "entropy", "clip_fraction/high"), strict=True):
        for number, arm in enumerate(ARMS):
            curves = [row[name] for row in rows if row["arm"] == arm]
            steps = rows[0]["steps"] if name == "reward" else range(1, STEPS + 1)
            for curve in curves:
                axis.plot(steps, curve, color=f"C{number}", alpha=0.25, linewidth=0.8)
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axis.plot(steps, means, color=f"C{number}", label=f"clip_high {arm}")
        axis.set(xlabel="step", title="held-out reward, without noise" if name == "reward" else name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=5e-4)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    model, rows = taught(options.runs, steps=600), list[dict[str, Any]]()
    for seed in SEEDS:
        data = made_data(options.runs, model, seed)
        for arm in ARMS:
            folder = options.runs / f"{arm.replace(' ', '_')}-{seed}"
            rows.append(measured(arm, seed, settings_of(arm, model, data, seed, options.lr), folder))
            sys.stdout.write(f"{arm} {seed} {rows[-1]['reward']}\n")
    last = {
        arm: {
            name: [round(statistics.mean(values), 4), round(min(values), 4), round(max(values), 4)]
            for name in ("reward", "entropy", "clip_fraction/high")
            for values in [[row[name][-1] for row in rows if row["arm"] == arm]]
        }
        for arm in ARMS
    }
    results = {
        "command": "python -m benchmarks.schedule --runs FOLDER --out FILE.json --figure FILE.png",
        "machine": machine(),
        "lr": options.lr,
        "last: mean, lowest and highest of three seeds": last,
        "rows": rows,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, options.figure)


if __name__ == "__main__":
    main()
