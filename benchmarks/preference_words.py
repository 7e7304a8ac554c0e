"""Words in a sentence: DPO from data, and what samples while it learns, by the held-out reward.

    offline dpo      pairs of the dataset: the best and the worst of six completions, by a noisy reward
    online dpo       two fresh samples, compared by the reward
    rlhf workflow    best against worst of eight samples of the iterate, three iterations
    dno              every two of four samples of the iterate, soft labels, three iterations
    hypo             the dataset's pairs, and a KL on own samples, without a reward

The two-layer model and the datasets are those of `benchmarks.offline_data`; a seed has its own dataset. All
methods make the same number of updates from as many prompts, with one learning rate. The held-out reward is
without noise, on 8 samples a prompt.

    python -m benchmarks.preference_words --runs FOLDER --out FILE.json --figure FILE.png
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
from benchmarks.offline_data import Row, write, write_set
from benchmarks.runs import machine, read
from rlhf.config.load import make_config
from rlhf.trainer import Trainer

STEPS, EVERY, PROMPTS, LIMIT = 90, 15, 8, 16
SEEDS = (0, 1, 2)
ITERATIONS = {"steps": STEPS // 3}
PAIRS: dict[str, Any] = {"mode": "offline", "train": "pairs.jsonl"}
ARMS: dict[str, dict[str, Any]] = {
    "offline dpo": {"algorithm": {"name": "dpo"}, "data": PAIRS},
    "online dpo": {"algorithm": {"name": "dpo"}, "rollout": {"group_size": 2}},
    "rlhf workflow": {
        "algorithm": {"name": "dpo"},
        "iteration": ITERATIONS,
        "rollout": {
            "samplers": [{"source": "iterate", "n": 4}, {"source": "iterate", "n": 4, "temperature": 0.7}]
        },
    },
    "dno": {
        "algorithm": {"name": "dno"},
        "iteration": ITERATIONS,
        "pairs": {"rule": "all", "labels": "reward"},
        "rollout": {"samplers": [{"source": "iterate", "n": 4}]},
    },
    "hypo": {
        "algorithm": {"name": "hypo", "kl": {"coef": 0.01}},
        "data": PAIRS | {"mode": "offline_to_online", "mix": True},
        "pairs": {"rule": "of_data"},
        "rollout": {"group_size": 4},
    },
}


def write_pairs(data: Path) -> None:
    """pairs.jsonl: of each prompt the best and the worst completion by the noisy reward."""
    by_prompt: dict[str, list[Row]] = {}
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append(row)
    pairs: list[Row] = []
    for prompt, rows in by_prompt.items():
        best, worst = max(rows, key=lambda r: r["reward"]), min(rows, key=lambda r: r["reward"])
        if best["reward"] > worst["reward"]:
            texts = {"chosen": best["completion"], "rejected": worst["completion"]}
            pairs.append({"prompt": prompt, "words": best["words"]} | texts)
    write(data / "pairs.jsonl", pairs)


def settings_of(name: str, model: Path, data: Path, seed: int, lr: float) -> dict[str, Any]:
    changes = ARMS[name]
    shared = base(model, data, steps=STEPS, prompts=PROMPTS, limit=LIMIT, lr=lr)
    shared["model"]["dtype"] = "float32"
    shared["data"] = {"mode": "online", "max_prompt_tokens": 80} | changes.get(
        "data", {"train": "train.jsonl"}
    )
    shared["data"] |= {"train": str(data / shared["data"]["train"]), "eval": str(data / "eval.jsonl")}
    if shared["data"]["mode"] == "online":
        # each prompt once
        shared["data"]["train"] = str(data / "best.jsonl")
    del shared["rollout"]["group_size"], shared["prompt_value"]
    shared["rollout"] |= changes.get("rollout", {})
    others = {key: value for key, value in changes.items() if key not in ("data", "rollout")}
    return shared | others | {"seed": seed, "eval": {"every": EVERY, "samples": 8}}


def run(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains unless that was done before; returns the curve of the held-out reward, and the last metrics."""
    if not (folder / "report.html").is_file():
        quiet = {"run_dir": str(folder), "monitor": {"sinks": [], "samples_per_step": 0}}
        checkpoint = {"every": 0, "export": False, "resume": "auto"}
        Trainer(make_config(settings | quiet | {"checkpoint": checkpoint})).run()
    steps, evaluations = read(folder)
    last = {name: value for name, value in steps[-1].items() if name.startswith("pairs/")}
    return {
        "steps": [record["step"] for record in evaluations],
        "reward": [round(record["reward"], 4) for record in evaluations],
        "seconds_a_step": round(statistics.median(step["time/step"] for step in steps), 3),
        "last": {name: round(value, 4) for name, value in last.items()},
    }


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The held-out reward along the steps: a thin line a seed, a thick one for their mean."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, name in enumerate(ARMS):
        curves = [row for row in rows if row["arm"] == name]
        for row in curves:
            axis.plot(row["steps"], row["reward"], color=f"C{number}", alpha=0.25, linewidth=0.8)
        means = [statistics.mean(values) for values in zip(*(row["reward"] for row in curves), strict=True)]
        axis.plot(curves[0]["steps"], means, color=f"C{number}", marker="o", label=name)
    axis.set(xlabel="step", ylabel="held-out reward, without noise")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def made_data(runs: Path, model: Path, seed: int) -> Path:
    """The folder of a seed's completions and pairs, which are made once."""
    data = runs / f"data-{seed}"
    if not (data / "eval.jsonl").is_file():
        write_set(data, model, chat=False, prompts=300, held_out=64, seed=seed, max_tokens=LIMIT)
    write_pairs(data)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    model = taught(options.runs, steps=600)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        data = made_data(options.runs, model, seed)
        for name in ARMS:
            made = settings_of(name, model, data, seed, options.lr)
            rows.append(
                {"arm": name, "seed": seed} | run(made, options.runs / f"{name.replace(' ', '_')}-{seed}")
            )
            sys.stdout.write(f"{rows[-1]}\n")
    results = {
        "command": "python -m benchmarks.preference_words --runs FOLDER --out FILE.json --figure FILE.png",
        "machine": machine(),
        "lr": options.lr,
        "rows": rows,
        "last": {
            name: [round(statistics.mean(last), 4), min(last), max(last)]
            for name in ARMS
            for last in [[row["reward"][-1] for row in rows if row["arm"] == name]]
        },
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, options.figure)


if __name__ == "__main__":
    main()
