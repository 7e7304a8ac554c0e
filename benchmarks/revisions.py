"""Words in a sentence: what becomes of answers that a model improves itself, after SRPO and after DPO.

The two-layer model and the pairs are those of `benchmarks.preference_words`. Such a model knows one form of
prompt alone, so it is taught first what a second answer looks like, without a word about which is better: by
supervised steps on completions of the dataset behind other completions of the same prompt and the request to
improve them. Then `srpo` and `dpo` learn the same pairs, with as many updates, and `rlhf eval --revise 5`
asks for five revisions of 4 samples of each held-out prompt. The reward is the held-out one, without noise.

    python -m benchmarks.revisions --runs FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.advantage_weighted import taught
from benchmarks.offline_data import Row, write
from benchmarks.preference_words import made_data, settings_of
from benchmarks.runs import machine
from rlhf.cli import main as rlhf
from rlhf.config.load import make_config
from rlhf.trainer import Trainer

ASK, ROUNDS, STEPS, LESSONS, SAMPLES = " use :", 5, 90, 200, 4
SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {"srpo": {"name": "srpo", "beta": 0.1}, "dpo": {"name": "dpo"}}


def write_lessons(data: Path, seed: int) -> None:
    """lessons.jsonl: completions of the dataset, as a first answer and as a second one behind another."""
    by_prompt: dict[str, list[str]] = {}
    words: dict[str, list[str]] = {}
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append(row["completion"])
        words[row["prompt"]] = row["words"]
    rng, rows = random.Random(seed), list[Row]()
    for prompt, completions in by_prompt.items():
        for completion in completions:
            # as the reviser writes it: the first answer without its end, and the request
            second = f"{prompt} {rng.choice(completions)}{ASK}"
            shared = {"words": words[prompt], "completion": completion}
            rows += [{"prompt": asked} | shared for asked in (prompt, second)]
    rng.shuffle(rows)
    write(data / "lessons.jsonl", rows)


def train(name: str, model: Path, data: Path, run: Path, seed: int, **changes: Any) -> Path:
    """Trains unless that was done before; returns the run's model."""
    if not (run / "model").is_dir():
        made = settings_of("offline dpo", model, data, seed, 3e-4) | changes
        made["data"] |= {"improve_prompt": ASK, "max_prompt_tokens": 24}
        if name == "lessons":
            made["data"] |= {"train": str(data / "lessons.jsonl")}
        quiet = {"sinks": [], "samples_per_step": 0}
        made |= {"run_dir": str(run), "monitor": quiet, "eval": {"samples": SAMPLES}}
        Trainer(make_config(made | {"checkpoint": {"every": 0, "resume": "auto"}})).run()
    return run / "model"


def measure(run: Path) -> dict[str, list[float]]:
    """Reward and accuracy of the first answers, and of each round of revisions."""
    out = run / "revisions.json"
    if not out.is_file():
        rlhf(["eval", str(run), "--revise", str(ROUNDS), "--out", str(out), f"eval.samples={SAMPLES}"])
    found = json.loads(out.read_text())
    rounds = found["revisions"]
    return {
        "reward": [round(x, 4) for x in (found["reward"], *(r["reward"] for r in rounds))],
        "accuracy": [round(x, 4) for x in (found["accuracy"]["value"], *(r["accuracy"] for r in rounds))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    model = taught(options.runs, steps=600)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        data = made_data(options.runs, model, seed)
        write_lessons(data, seed)
        sft: dict[str, Any] = {"algorithm": {"name": "sft"}, "steps": LESSONS}
        lessons = train("lessons", model, data, options.runs / f"lessons-{seed}", seed, **sft)
        for name, algorithm in ARMS.items():
            run = options.runs / f"revised-{name}-{seed}"
            train(name, lessons, data, run, seed, algorithm=algorithm, steps=STEPS)
            rows.append({"arm": name, "seed": seed} | measure(run))
            sys.stdout.write(f"{rows[-1]}\n")
    means = {
        name: [
            round(statistics.mean(values), 4)
            for values in zip(*(row["reward"] for row in rows if row["arm"] == name), strict=True)
        ]
        for name in ARMS
    }
    command = "python -m benchmarks.revisions --runs FOLDER --out FILE.json"
    results = {"command": command, "machine": machine(), "reward": means, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
