"""PPO-max and plain PPO against the same reward model: does the true score rise, and how far does the KL go?

First a reward model is trained on pairs that a rule made (configs/reward_model.yaml), then a policy against
it by either algorithm (configs/ppo_max.yaml, configs/ppo.yaml, which differ only in the algorithm). The rule
itself is logged as an objective of weight 0. Finished runs are not repeated, interrupted ones are continued.

Run: `python -m benchmarks.ppo_max --model MODEL_FOLDER --runs FOLDER --out FILE.json --plot FILE.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from benchmarks.runs import ROOT, Records, machine, read, train

matplotlib.use("Agg")

ARMS = {"ppo_max": "PPO-max", "ppo": "PPO"}
CURVES = {
    "reward/truth": "true score (rule)",
    "reward/reward_model": "reward model's score",
    "kl/ref": "KL to the reference, nats a token",
    "length/mean": "length, tokens",
}
PARTS = ("reward/correct", "reward/short", "reward/polite")
CRITIC = ("critic/explained_variance", "critic/loss")
KEPT = (*CURVES, *PARTS, *CRITIC, "perplexity", "entropy", "kl/coef", "ratio/mean", "length/truncated")
FEW = 3
"""The number of steps, at the beginning and at the end, whose mean is reported."""


def reward_model(options: argparse.Namespace) -> dict[str, Any]:
    run = options.runs / "reward_model"
    settings = [f"model.path={options.model}", "checkpoint.resume=auto", "checkpoint.every=10"]
    train(ROOT / "configs" / "reward_model.yaml", run, settings, done="model/config.json")
    steps, evaluations = read(run)
    calibration = json.loads((run / "calibration.json").read_text())
    before, after = evaluations[0], evaluations[-1]
    return {
        "steps": len(steps),
        "examples": int(sum(s["reward_model/examples"] for s in steps)),
        "held_out_pairs": after["num_samples"],
        "accuracy_before": round(before["accuracy"], 4),
        "accuracy_after": round(after["accuracy"], 4),
        "ci_after": [round(after["ci_low"], 4), round(after["ci_high"], 4)],
        "calibration_error": round(calibration[-1]["objectives"]["score"]["calibration_error"], 4),
        "loss_by_step": [round(s["reward_model/loss"], 4) for s in steps],
        "minutes": minutes(steps),
    }


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> tuple[Records, Records]:
    config, run = ROOT / "configs" / f"{arm}.yaml", options.runs / f"{arm}-{seed}"
    model = str(options.runs / "reward_model" / "model")
    functions = yaml.safe_load(config.read_text())["reward"]["functions"]
    functions[0]["params"]["model"] = model
    settings = [
        f"seed={seed}",
        f"model.path={options.model}",
        f"reward.functions={json.dumps(functions)}",
        "checkpoint.resume=auto",
        "checkpoint.every=6",
        "checkpoint.keep_last=1",
        *options.set,
    ]
    train(config, run, settings)
    return read(run)


def summary(arm: str, seed: int, steps: Records, evaluations: Records) -> dict[str, Any]:
    learned = [s for s in steps if not s["critic/warmup"]]
    kept = {name: [rounded(s.get(name)) for s in steps] for name in KEPT if name in steps[-1]}
    return {
        "arm": arm,
        "seed": seed,
        "first": {name: mean(name, steps[:FEW]) for name in (*CURVES, *PARTS) if name != "kl/ref"},
        "last": {name: mean(name, steps[-FEW:]) for name in (*CURVES, *PARTS)},
        "kl_max": rounded(max(s["kl/ref"] for s in learned)),
        "held_out_right": [round(e["accuracy"], 4) for e in evaluations],
        "held_out_samples": evaluations[-1]["num_samples"] if evaluations else 0,
        "completions": int(sum(s["rollout/samples"] for s in steps)),
        "minutes": minutes(steps),
        "seconds_a_step": rounded(statistics.median(s["time/step"] for s in steps)),
        "peak_gib": rounded(max(s["memory/peak_gib"] for s in steps)),
        "by_step": kept,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/ppo_max.md: means of first and last steps; held-out share before and after."""
    lines = [
        "| | true score | reward model | length | KL at the end, highest | held-out answers right |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, last = row["first"], row["last"]
        moved = [f"{first[name]:.2f} → {last[name]:.2f}" for name in CURVES if name != "kl/ref"]
        held_out = [f"{share:.2f}" for share in row["held_out_right"]]
        known = f"{held_out[0]} → {held_out[-1]}" if len(held_out) > 1 else "not measured"
        cells = [*moved, f"{last['kl/ref']:.3f}, {row['kl_max']:.3f}", known]
        lines.append(f"| {ARMS[row['arm']]}, seed {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[tuple[str, int], Records], target: float, file: Path) -> None:
    """Draws single seeds as thin lines, and their mean, where there are several, as a thick one."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharex=True)
    for axis, (name, label) in zip(axes.flat, CURVES.items(), strict=True):
        for number, (arm, title) in enumerate(ARMS.items()):
            curves = [[s.get(name) for s in record] for (of, _), record in runs.items() if of == arm]
            for curve in curves:
                steps = range(1, len(curve) + 1)
                axis.plot(steps, numbers(curve), color=f"C{number}", alpha=1.0 if len(curves) == 1 else 0.3)
            if len(curves) > 1:
                middle = [statistics.mean(column) for column in zip(*map(numbers, curves), strict=True)]
                axis.plot(range(1, len(middle) + 1), middle, color=f"C{number}", linewidth=2)
            if curves:
                axis.plot([], [], color=f"C{number}", label=title)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "kl/ref":
            axis.axhspan(0, 2 * target, color="grey", alpha=0.15, linewidth=0, label="band")
            axis.axhline(target, color="grey", linewidth=1, linestyle="--", label="target")
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def numbers(curve: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in curve]


def mean(name: str, steps: Records) -> float | None:
    return rounded(statistics.mean(s[name] for s in steps))


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def minutes(steps: Records) -> float:
    return round(sum(s["time/step"] for s in steps) / 60, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="of the policies' runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.runs = options.runs.absolute()
    learned = reward_model(options)
    print(json.dumps(learned), flush=True)  # noqa: T201
    runs: dict[tuple[str, int], Records] = {}
    rows: list[dict[str, Any]] = []
    # all arms of one seed before the next, so that the results are comparable if the time runs out
    for seed in options.seeds:
        for arm in options.arms:
            steps, evaluations = run_arm(arm, seed, options)
            runs[arm, seed] = steps
            rows.append(summary(arm, seed, steps, evaluations))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "by_step"}), flush=True)  # noqa: T201
    print(table(rows))  # noqa: T201
    target = yaml.safe_load((ROOT / "configs" / "ppo_max.yaml").read_text())["algorithm"]["kl"]["target"]
    report = {
        "command": "python -m benchmarks.ppo_max " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "kl_band": [0.0, 2 * target],
        "reward_model": learned,
        "runs": rows,
    }
    if options.plot:
        draw(runs, target, options.plot)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
