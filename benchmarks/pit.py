"""Words in a sentence: what PIT's policy makes of answers that it is shown, and of its own, round by round.

The two-layer model, the datasets and the request are those of `benchmarks.revisions`, and so is the model
that PIT starts from: one that has been taught what a second answer looks like. The reward `gap` learns from
pairs of the dataset's completions, ordered by their noisy rewards, with prompts held out. The policy learns
by GRPO to improve the best and the worst completion of each prompt. Then both models improve drafts to
held-out prompts that the taught model wrote, and their own answers four times; once more with
`--revise-while`, by which an answer stays that the reward does not find improved. Measured is the reward
without noise, which nobody learns from.

    python -m benchmarks.pit --runs FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.advantage_weighted import taught
from benchmarks.offline_data import Row, write
from benchmarks.preference_words import made_data, settings_of
from benchmarks.revisions import ASK, LESSONS, train, write_lessons
from benchmarks.runs import ROOT, machine
from examples.offline.reward import one
from rlhf.cli import main as rlhf
from rlhf.config.load import make_config
from rlhf.config.reward_model import RewardModelConfig
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.trainer import Trainer

ROUNDS, SAMPLES, STEPS, GAP_STEPS, HELD_OUT = 4, 4, 90, 250, 40
SEEDS = (0, 1, 2)
GAP, TRUTH = "reward_model", "words_used"


def write_pairs(data: Path, seed: int) -> None:
    """gap_train.jsonl and gap_eval.jsonl: up to four pairs of each prompt, the better one by the noisy
    reward; drafts.jsonl: the best and the worst completion of each prompt, to be improved."""
    by_prompt: dict[str, list[Row]] = {}
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append(row)
    rng, pairs, drafts = random.Random(seed), list[list[Row]](), list[Row]()
    for prompt, rows in by_prompt.items():
        unequal = [two for two in combinations(rows, 2) if two[0]["reward"] != two[1]["reward"]]
        several = [
            sorted(two, key=lambda r: -r["reward"]) for two in rng.sample(unequal, min(4, len(unequal)))
        ]
        pairs.append(
            [
                {"prompt": prompt, "chosen": best["completion"], "rejected": worst["completion"]}
                for best, worst in several
            ]
        )
        ends = max(rows, key=lambda r: r["reward"]), min(rows, key=lambda r: r["reward"])
        drafts += [{"prompt": prompt, "words": r["words"], "draft": r["completion"]} for r in ends]
    rng.shuffle(drafts)
    write(data / "gap_train.jsonl", [pair for several in pairs[HELD_OUT:] for pair in several])
    write(data / "gap_eval.jsonl", [pair for several in pairs[:HELD_OUT] for pair in several])
    write(data / "drafts.jsonl", drafts)


def train_gap(model: Path, data: Path, run: Path, seed: int) -> dict[str, Any]:
    """The reward of gaps, unless it was trained before; returns what it is worth on held-out pairs."""
    if not (run / "model").is_dir():
        files = {"train": str(data / "gap_train.jsonl"), "eval": str(data / "gap_eval.jsonl")}
        settings: dict[str, Any] = {
            "task": "reward_model",
            "run_dir": str(run),
            "seed": seed,
            "steps": GAP_STEPS,
            "model": {"path": str(model), "dtype": "float32"},
            "data": files | {"max_prompt_tokens": 24, "max_completion_tokens": 96},
            "score": {"kind": "gap"},
            "batch": {"tokens": 3000},
            "learner": {"lr": 1e-3, "schedule": "linear", "microbatch_tokens": 4096},
            "monitor": {"sinks": []},
        }
        RewardModelTrainer(RewardModelConfig.model_validate(settings)).run()
    found = json.loads((run / "calibration.json").read_text())[-1]["objectives"]["score"]
    return {name: round(found[name], 4) for name in ("accuracy", "above zero", "of itself")}


def settings(lessons: Path, gap: Path, data: Path, seed: int) -> dict[str, Any]:
    made = settings_of("online dpo", lessons, data, seed, 3e-4)
    function = {"path": GAP, "params": {"model": str(gap / "model")}, "batch": "step"}
    made["reward"] = {
        "functions": [
            function | {"memory_gib": 16.0, "timeout": 60.0},
            {"path": f"{ROOT}/examples/offline/reward.py:{TRUTH}", "weight": 0.0, "batch": "step"},
        ]
    }
    made["data"] |= {"improve_column": "draft", "improve_prompt": ASK, "train": str(data / "drafts.jsonl")}
    made["data"] |= {"eval": str(data / "eval_drafts.jsonl"), "max_prompt_tokens": 64}
    made["rollout"] |= {"group_size": 6}
    return made | {"algorithm": {"name": "grpo", "kl": {"coef": 0.01}}, "steps": STEPS}


def train_policy(made: dict[str, Any], run: Path) -> list[float]:
    """Trains unless that was done before; returns the mean gap of the first and of the last ten steps."""
    if not (run / "model").is_dir():
        quiet = {"sinks": [], "samples_per_step": 0}
        made |= {"run_dir": str(run), "monitor": quiet, "eval": {"every": 0, "samples": SAMPLES}}
        Trainer(make_config(made | {"checkpoint": {"every": 0, "resume": "auto"}})).run()
    gaps = [json.loads(line)["reward/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [round(statistics.mean(some), 4) for some in (gaps[:10], gaps[-10:])]


def write_drafts(lessons: Path, data: Path, seed: int) -> None:
    """eval_drafts.jsonl: held-out prompts, each with an answer of the model that PIT starts from."""
    out = data / "drafts.json"
    if not out.is_file():
        reward = f"{ROOT}/examples/offline/reward.py:{TRUTH}"
        given = ["--data", str(data / "eval.jsonl"), "--reward", reward, "--out", str(out)]
        assert rlhf(["eval", str(lessons.parent), *given, "eval.samples=1", f"seed={seed}"]) == 0
    texts = [record["completions"][0]["text"] for record in json.loads(out.read_text())["records"]]
    rows = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    write(data / "eval_drafts.jsonl", [r | {"draft": t} for r, t in zip(rows, texts, strict=True) if t])


def measure(model: Path, run: Path, *, stop: bool) -> dict[str, list[float]]:
    """The true reward, and the gap to what was improved, of the first improvement and of each further one."""
    out = run / f"{model.parent.name}{'-stops' if stop else ''}.json"
    if not out.is_file():
        ends = ["--revise-while", GAP] if stop else []
        config = ["--config", str(run / "config.yaml"), "--revise", str(ROUNDS), "--out", str(out)]
        assert rlhf(["eval", str(model), *config, *ends, f"eval.samples={SAMPLES}"]) == 0
    found = json.loads(out.read_text())
    first = [c["objectives"] for record in found["records"] for c in record["completions"]]
    rounds = [{name: statistics.mean(c[name] for c in first) for name in (TRUTH, GAP)}]
    rounds += [r["objectives"] for r in found["revisions"]]
    return {
        "truth": [round(r[TRUTH], 4) for r in rounds],
        "gap": [round(r[GAP], 4) for r in rounds],
        "changed": [r["changed"] for r in found["revisions"]],
    }


def one_seed(runs: Path, seed: int) -> list[dict[str, Any]]:
    model = taught(runs, steps=600)
    data = made_data(runs, model, seed)
    write_lessons(data, seed)
    write_pairs(data, seed)
    sft: dict[str, Any] = {"algorithm": {"name": "sft"}, "steps": LESSONS}
    lessons = train("lessons", model, data, runs / f"lessons-{seed}", seed, **sft)
    gap = runs / f"gap-{seed}"
    worth = train_gap(model, data, gap, seed)
    write_drafts(lessons, data, seed)
    run = runs / f"pit-{seed}"
    learned = train_policy(settings(lessons, gap, data, seed), run)
    drafts = [json.loads(line) for line in (data / "eval_drafts.jsonl").read_text().splitlines()]
    truth = round(statistics.mean(one(row["draft"], row["words"]) for row in drafts), 4)
    shared = {"seed": seed, "drafts": truth, "gap_model": worth, "gap_while_learning": learned}
    return [
        shared | {"arm": arm} | measure(of, run, stop=stop)
        for arm, of, stop in (
            ("taught", lessons, False),
            ("pit", run / "model", False),
            ("pit, stops", run / "model", True),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows += one_seed(options.runs, seed)
        sys.stdout.write("".join(f"{row}\n" for row in rows[-3:]))
    arms = dict.fromkeys(row["arm"] for row in rows)
    means = {
        arm: {
            name: [
                round(statistics.mean(values), 4)
                for values in zip(*(row[name] for row in rows if row["arm"] == arm), strict=True)
            ]
            for name in ("truth", "gap")
        }
        for arm in arms
    }
    command = "python -m benchmarks.pit --runs FOLDER --out FILE.json"
    command += f" --seeds {' '.join(map(str, options.seeds))}"
    results = {"command": command, "machine": machine(), "means": means, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
