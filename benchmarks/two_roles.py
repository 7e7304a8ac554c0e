"""Words in a sentence: OFS-DPO beside DPO, and SRPO beside IPO with pairs from good and from bad writers.

The two-layer model and the data are those of `benchmarks.preference_words`; a seed has its own data.

    twins     `dpo` and `ofs_dpo` (alpha .1, the default, and .3) train LoRA adapters on the same pairs, with
              as many updates of the (fast) adapter. Measured: the share of held-out pairs, by the reward
              without noise, that the log-ratio to the reference orders rightly; and how far the log-prob of
              the chosen completions has fallen at the end.
    writers   The model is first taught what a second answer looks like (`benchmarks.revisions`). Then `srpo`
              and `ipo` learn pairs of the better three and of the worse three of six completions of a prompt,
              by the noisy reward: best against worst of the three. Both methods want the same margin,
              1 / (2 beta). Measured: the reward without noise of samples of held-out prompts; the spread is
              its difference between the two writers.

    python -m benchmarks.two_roles --runs FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.advantage_weighted import taught
from benchmarks.offline_data import Row, sample, write
from benchmarks.preference_words import LIMIT, made_data, settings_of
from benchmarks.revisions import ASK, LESSONS, train, write_lessons
from benchmarks.runs import machine, read
from examples.offline.reward import one
from rlhf.config.load import make_config
from rlhf.trainer import Trainer

SEEDS = (0, 1, 2)
BETA = 0.1
TWINS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": BETA},
    "ofs_dpo": {"name": "ofs_dpo", "beta": BETA},
    "ofs_dpo, alpha .3": {"name": "ofs_dpo", "beta": BETA, "alpha": 0.3},
}
WRITERS: dict[str, dict[str, Any]] = {
    "srpo": {"name": "srpo", "beta": BETA},
    "ipo": {"name": "ipo", "tau": BETA, "per_token": False},
}
GOOD, BAD = "pairs_good.jsonl", "pairs_bad.jsonl"
LORA = {"rank": 8, "alpha": 16}
LR = 3e-4
ADAPTER_LRS = (3e-3, 3e-4)
"""Of the adapters in `twins`; with the first, 90 updates learn every pair."""


def pair(rows: Sequence[Row]) -> Row | None:
    """The best of the completions against the worst; None where all have one reward."""
    best, worst = max(rows, key=lambda r: r["reward"]), min(rows, key=lambda r: r["reward"])
    if best["reward"] == worst["reward"]:
        return None
    shared = {"prompt": best["prompt"], "words": best["words"]}
    return shared | {"chosen": best["completion"], "rejected": worst["completion"]}


def write_writers(data: Path) -> tuple[int, int]:
    """The pairs of the better and of the worse three completions of each prompt; returns how many."""
    by_prompt: dict[str, list[Row]] = {}
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append(row)
    halves: list[list[Row]] = [[], []]
    for rows in by_prompt.values():
        ranked = sorted(rows, key=lambda r: r["reward"], reverse=True)
        for half, some in zip(halves, (ranked[:3], ranked[-3:]), strict=True):
            found = pair(some) if len(some) > 1 else None
            half += [] if found is None else [found]
    write(data / GOOD, halves[0])
    write(data / BAD, halves[1])
    return len(halves[0]), len(halves[1])


def write_held_out(data: Path, model: Path, seed: int) -> None:
    """Pairs of the held-out prompts, by the reward without noise; made once."""
    if (data / "eval_pairs.jsonl").is_file():
        return
    wanted = [json.loads(line)["words"] for line in (data / "eval.jsonl").read_text().splitlines()]
    rows = sample(model, wanted, chat=False, seed=seed + 1000, max_tokens=LIMIT)
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row | {"reward": one(row["completion"], row["words"])})
    write(
        data / "eval_pairs.jsonl", [made for rows in by_prompt.values() if (made := pair(rows)) is not None]
    )


def run(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains unless that was done before; returns what the last evaluation and the curves of pairs say."""
    if not (folder / "report.html").is_file():
        quiet = {"run_dir": str(folder), "monitor": {"sinks": [], "samples_per_step": 0}}
        checkpoint = {"every": 0, "export": False, "resume": "auto"}
        Trainer(make_config(settings | quiet | {"checkpoint": checkpoint})).run()
    steps, evaluations = read(folder)
    last = evaluations[-1]
    chosen = [step["pairs/chosen_logprob"] for step in steps]
    found = {
        "held_out": round(last["pairs"]["accuracy"], 4),
        "held_out_margin": round(last["pairs"]["margin"], 3),
        "reward": round(last["reward"], 4),
        # of ten updates each, because a batch has eight pairs
        "chosen_logprob": [round(statistics.mean(some), 4) for some in (chosen[:10], chosen[-10:])],
    }
    twin = {name: round(steps[-1][name], 4) for name in ("twin/gap", "twin/slow_margin") if name in steps[-1]}
    return found | twin | {"swaps": sum(step.get("twin/swaps", 0.0) for step in steps)}


def settings(model: Path, data: Path, seed: int, file: str, algorithm: dict[str, Any], lr: float) -> Any:
    made = settings_of("offline dpo", model, data, seed, lr) | {
        "algorithm": algorithm,
        "eval": {"samples": 8},
    }
    made["data"] |= {"train": str(data / file), "eval": str(data / "eval_pairs.jsonl")}
    return made


def twins(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        data = made_data(options.runs, model, seed)
        write_held_out(data, model, seed)
        for lr, (name, algorithm) in product(ADAPTER_LRS, TWINS.items()):
            made = settings(model, data, seed, "pairs.jsonl", algorithm, lr)
            made["model"] |= {"lora": LORA}
            folder = options.runs / f"twin-{name.replace(', alpha ', '')}-{lr:g}-{seed}"
            rows.append({"arm": name, "lr": lr, "seed": seed} | run(made, folder))
            sys.stdout.write(f"{rows[-1]}\n")
    return rows


def writers(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        data = made_data(options.runs, model, seed)
        write_lessons(data, seed)
        counts = write_writers(data)
        write_held_out(data, model, seed)
        sft: dict[str, Any] = {"algorithm": {"name": "sft"}, "steps": LESSONS}
        lessons = train("lessons", model, data, options.runs / f"lessons-{seed}", seed, **sft)
        for name, algorithm in WRITERS.items():
            for file, count in zip((GOOD, BAD), counts, strict=True):
                made = settings(lessons, data, seed, file, algorithm, LR)
                if name == "srpo":
                    made["data"] |= {"improve_prompt": ASK, "max_prompt_tokens": 24}
                folder = options.runs / f"writer-{name}-{file.removesuffix('.jsonl')}-{seed}"
                shared = {"arm": name, "seed": seed, "pairs": file.removesuffix(".jsonl"), "count": count}
                rows.append(shared | run(made, folder))
                sys.stdout.write(f"{rows[-1]}\n")
    return rows


def spread_of(values: Sequence[float]) -> list[float]:
    """Mean, smallest and largest."""
    return [round(x, 4) for x in (statistics.mean(values), min(values), max(values))]


def of_twins(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for lr, name in product(ADAPTER_LRS, TWINS):
        some = [row for row in rows if (row["arm"], row["lr"]) == (name, lr)]
        fallen = [row["chosen_logprob"][1] - row["chosen_logprob"][0] for row in some]
        keys = ("held_out", "held_out_margin", "reward")
        values = {key: spread_of([row[key] for row in some]) for key in keys}
        found[f"{name}, lr {lr:g}"] = values | {"chosen_logprob_change": spread_of(fallen)}
    return found


def of_writers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By method: reward and margin by writer, and the difference between the writers of a seed."""
    found: dict[str, Any] = {}
    for name, key in product(WRITERS, ("reward", "held_out_margin")):
        by_writer = {
            kind: [row[key] for row in rows if (row["arm"], row["pairs"]) == (name, kind)]
            for kind in ("pairs_good", "pairs_bad")
        }
        apart = [abs(a - b) for a, b in zip(*by_writer.values(), strict=True)]
        found[f"{name}, {key}"] = {kind: spread_of(values) for kind, values in by_writer.items()} | {
            "spread": spread_of(apart),
            "spread_by_seed": [round(x, 4) for x in apart],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    model = taught(options.runs, steps=600)
    of_twin, of_writer = twins(options, model), writers(options, model)
    results = {
        "command": "python -m benchmarks.two_roles --runs FOLDER --out FILE.json",
        "machine": machine(),
        "twins": of_twins(of_twin),
        "writers": of_writers(of_writer),
        "rows": {"twins": of_twin, "writers": of_writer},
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
