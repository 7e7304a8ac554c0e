"""DTPO against GRPO on the sum of the same rewards, on questions half of which need a closer look.

The model, its pictures and its tool are those of benchmarks/small_cropper.py; rewards and constants are those
of configs/adaptvision_qwen2_5_vl_7b.yaml. At the start the tool is called for half of the questions, whatever
they are. No question comes twice in a run, so the figures of a step are those of held-out questions: the
share for which the tool was called, and of right answers, of the questions that the small picture answers
(readable) and of those that it does not (hidden).

    dtpo        outcome (right, balance) and tool (inside, area) normalised apart, means by turn
    grpo        the sum of the four
    no_balance  dtpo without the reward `balance`

Expected before any run: at equal shares of right answers dtpo calls the tool for the hidden half alone, so in
one half of all episodes; grpo goes to always or never, because a call that is not needed costs .1 of balance
and earns .1 for the part that it shows; no_balance calls it too often, since nothing speaks against it. What
came is in docs/environments.md.

    python -m benchmarks.dtpo --data FOLDER --runs FOLDER --out FILE.json --plot docs/dtpo.png

FOLDER of the data is made first if it is not there. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt

from benchmarks.cropper_task import BOXES, KINDS
from benchmarks.runs import ROOT, Records, machine, read
from benchmarks.small_cropper import ANSWERS, make, tokenizer
from rlhf.config.load import make_config
from rlhf.trainer import Trainer

matplotlib.use("Agg")

DTPO = {
    "name": "dtpo",
    "tool_objectives": ["inside", "area"],
    "tool_coef": 0.3,
    "earlier_weight": 0.5,
    "clip_low": 0.2,
    "clip_high": 0.24,
}
GRPO = {"name": "grpo", "clip_low": 0.2, "clip_high": 0.24}
ARMS: dict[str, dict[str, Any]] = {"dtpo": DTPO, "grpo": GRPO, "no_balance": DTPO}
TITLES = {"dtpo": "DTPO", "grpo": "GRPO on the sum", "no_balance": "DTPO without balance"}
CROP = f"{ROOT}/examples/crop"
REWARDS: tuple[dict[str, Any], ...] = (
    {"path": f"{CROP}/reward.py:right", "batch": "step"},
    {"path": f"{CROP}/reward.py:balance", "batch": "group"},
    {"path": f"{CROP}/reward.py:inside", "batch": "step", "weight": 0.1},
    {"path": f"{CROP}/reward.py:area", "batch": "group", "weight": -0.2},
    {"path": f"{ROOT}/benchmarks/cropper_task.py:seen", "batch": "step", "weight": 0.0},
)
CURVES = {
    "reward/tool_hidden": "tool called: hidden questions",
    "reward/tool_readable": "tool called: readable questions",
    "reward/right_hidden": "right: hidden questions",
    "reward/right_readable": "right: readable questions",
}
KEPT = (*CURVES, "reward/right", "reward/inside", "reward/area", "reward/mean", "entropy")
LAST = 5
"""Steps at the end whose mean is reported."""


def settings_of(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    words = tokenizer().get_vocab()
    functions = [r for r in REWARDS if arm != "no_balance" or not r["path"].endswith(":balance")]
    return {
        "run_dir": str(options.runs / f"{arm}-{seed}"),
        "steps": options.steps,
        "seed": seed,
        "model": {"path": str(options.data / "model"), "dtype": "float32"},
        "data": {"train": str(options.data / "train.jsonl"), "max_prompt_tokens": 20},
        "environment": {
            "path": f"{CROP}/environment.py:Crop",
            "calls": f"{ROOT}/benchmarks/cropper_task.py:calls",
            "max_turns": 2,
            "workers": 1,
        },
        "reward": {"functions": functions},
        "algorithm": {**ARMS[arm], "kl": {"coef": 0.0}, "entropy_coef": 0.001},
        "rollout": {
            "prompts_per_step": 12,
            "group_size": 16,
            "max_completion_tokens": 40,
            # an answer and a part of the picture are the last words of their turns: nobody lists all colours
            "stop_token_ids": [words[word] for word in (*ANSWERS, *BOXES)],
        },
        "learner": {"lr": options.lr, "schedule": "constant", "microbatch_tokens": 8192},
        "checkpoint": {"every": 0, "export": False},
        "monitor": {"sinks": []},
    }


def run(arm: str, seed: int, options: argparse.Namespace) -> Records:
    settings = settings_of(arm, seed, options)
    folder = Path(settings["run_dir"])
    if not (folder / "report.html").is_file():
        Trainer(make_config(settings)).run()
    return read(folder)[0]


def summary(arm: str, seed: int, steps: Records) -> dict[str, Any]:
    ends = {"first": steps[:1], "last": steps[-LAST:]}
    rows: dict[str, Any] = {"arm": arm, "seed": seed}
    for name, some in ends.items():
        means = {key.split("/")[1]: statistics.mean(step[key] for step in some) for key in CURVES}
        # half of the questions are of each kind
        for what in ("tool", "right"):
            means[what] = statistics.mean(means[f"{what}_{kind}"] for kind in KINDS)
        rows[name] = {key: round(value, 4) for key, value in means.items()}
    rows["minutes"] = round(sum(step["time/step"] for step in steps) / 60, 2)
    rows["by_step"] = {name: [_rounded(step.get(name)) for step in steps] for name in KEPT}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Of each arm the mean over the seeds at the end, and the lowest and the highest."""
    names = ("tool", "tool_hidden", "tool_readable", "right", "right_hidden", "right_readable")
    lines = [" | ".join(("", *names, "")), "|---" * (1 + len(names)) + "|"]
    for arm in ARMS:
        own = [row["last"] for row in rows if row["arm"] == arm]
        cells = [
            f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in ([one[name] for one in own] for name in names)
            if values
        ]
        lines.append(" | ".join((f"| {TITLES[arm]}", *cells, "")))
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws seeds as thin lines, and their mean as a thick one."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained", sharex=True, sharey=True)
    for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
        for number, arm in enumerate(ARMS):
            curves = [_smooth(row["by_step"][name]) for row in rows if row["arm"] == arm]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=f"C{number}", alpha=0.3)
            middle = [statistics.mean(column) for column in zip(*curves, strict=True)]
            axis.plot(range(1, len(middle) + 1), middle, color=f"C{number}", linewidth=2, label=TITLES[arm])
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _smooth(values: list[float], width: int = 3) -> list[float]:
    """Means over the last few steps."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.data, options.runs = options.data.absolute(), options.runs.absolute()
    if not (options.data / "train.jsonl").is_file():
        make(options.data)
    rows: list[dict[str, Any]] = []
    # all arms of one seed before the next, so that an interrupted benchmark compares all arms
    for seed in options.seeds:
        for arm in options.arms:
            rows.append(summary(arm, seed, run(arm, seed, options)))
            told = {key: rows[-1][key] for key in ("arm", "seed", "first", "last", "minutes")}
            sys.stdout.write(f"{json.dumps(told)}\n")
    sys.stdout.write(f"{table(rows)}\n")
    report = {
        "command": " ".join(["python -m benchmarks.dtpo", *sys.argv[1:]]),
        "machine": machine(),
        "steps": options.steps,
        "lr": options.lr,
        "runs": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, options.plot)


if __name__ == "__main__":
    main()
