"""Learning from an offline dataset of mixed quality with noisy rewards: which method is best?

    sft             supervised fine-tuning on every completion
    sft_best        on the best completion of each prompt only, by the noisy reward
    a_lol           advantage above the prompt's value, ratio to the reference, drawn by priority
    a_lol_ref_free  the same without the ratio
    awr             exp(standardised advantage), baseline the mean of the others of the prompt

Additions of this project that are off by default, each next to the method it changes (`ablations`):

    awr_cold, awr_hot  awr at the temperatures 0.3 and 3
    awr_divergence     awr with a temperature for each prompt, picked by a head (divergence 0.5 nats)
    best_own           imitates the best of the policy's own rollouts of each prompt
    best_mixed         imitates the best of rollouts and data together (our analogue of A2PR)
    best_gated         the same, but only where the best is above the prompt's value

All take the same number of steps and completions a step, from the same model, with the same learning rate
and schedule. Then each model samples 8 completions of every held-out prompt at temperature 1: the mean
reward (without noise), the share of distinct n-grams among all n-grams sampled, the mean length. The row
`before` is the model that all methods start from.

`tiny`: a two-layer model that is taught the task first; each seed has its own dataset, sampled by that model,
and its own runs. `ablations`: the same model and datasets. `small`: SmolLM2-135M-Instruct on the dataset in
examples/offline, one run a method. Every model that was trained is kept in `--runs` and not trained again.
Run:

    python -m benchmarks.advantage_weighted tiny --runs FOLDER --out FILE.json
    python -m benchmarks.advantage_weighted ablations --runs FOLDER --out FILE.json
    python -m benchmarks.advantage_weighted small --model MODEL_FOLDER --runs FOLDER --out FILE.json
    python -m benchmarks.advantage_weighted plot TINY.json ABLATIONS.json --out FIGURE.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from benchmarks.offline_data import Row, lesson, save_tiny_model, token_ids, write, write_set
from benchmarks.runs import ROOT, machine
from examples.offline.reward import one
from rlhf.config.load import make_config
from rlhf.models.pretrained import load_tokenizer
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.native.engine import NativeEngine
from rlhf.trainer import Trainer
from rlhf.types import Prompt

matplotlib.use("Agg")

Settings = dict[str, Any]
SAMPLES = 8
ARMS: dict[str, Settings] = {
    "sft": {"algorithm": {"name": "sft"}, "data": {"sampling": "completions"}},
    "sft_best": {"algorithm": {"name": "sft"}, "data": {"sampling": "completions", "train": "best.jsonl"}},
    "a_lol": {"algorithm": {"name": "a_lol"}, "data": {"sampling": "priority"}},
    "a_lol_ref_free": {"algorithm": {"name": "a_lol_ref_free"}, "data": {"sampling": "priority"}},
    "awr": {"algorithm": {"name": "awr"}, "data": {"sampling": "groups"}},
}
MIXED = {"mode": "offline_to_online", "mix": True}
ABLATIONS: dict[str, Settings] = {
    "awr": ARMS["awr"],
    "awr_cold": {"algorithm": {"name": "awr", "temperature": 0.3}, "data": {}},
    "awr_hot": {"algorithm": {"name": "awr", "temperature": 3.0}, "data": {}},
    "awr_divergence": {"algorithm": {"name": "awr", "divergence": 0.5}, "data": {}},
    # best.jsonl has every prompt once
    "best_own": {"algorithm": {"name": "best_of"}, "data": {"mode": "online", "train": "best.jsonl"}},
    "best_mixed": {"algorithm": {"name": "best_of"}, "data": MIXED},
    "best_gated": {"algorithm": {"name": "best_of", "baseline": "prompt_value"}, "data": MIXED},
}
ALL = ARMS | ABLATIONS
TITLES = {
    "tiny": "two-layer model",
    "ablations": "two-layer model: ours, off by default",
    "small": "SmolLM2-135M-Instruct",
}
LABELS = {
    "sft": "SFT, all",
    "sft_best": "SFT, best",
    "a_lol": "A-LoL",
    "a_lol_ref_free": "A-LoL ref-free",
    "awr": "AWR",
    "awr_cold": "AWR, temperature 0.3",
    "awr_hot": "AWR, temperature 3",
    "awr_divergence": "AWR, one a prompt",
    "best_own": "best of own",
    "best_mixed": "best of own and data",
    "best_gated": "the same, above value",
}


def train(settings: Settings, run: Path) -> Path:
    """Trains one run to its end unless that was done before, and returns the folder of its model."""
    if not (run / "model").is_dir():
        quiet = {"run_dir": str(run), "monitor": {"sinks": [], "samples_per_step": 0}}
        Trainer(make_config(settings | quiet | {"checkpoint": {"every": 0, "resume": "auto"}})).run()
        if not (run / "model").is_dir():
            sys.exit("stopped; the same command goes on")
        shutil.rmtree(run / "checkpoints")
    return run / "model"


def base(model: Path, data: Path, *, steps: int, prompts: int, limit: int, lr: float) -> Settings:
    """The settings that all methods share. Each prompt of the dataset has six completions.

    Encoding a completion's text anew may give more tokens than were sampled, hence some room above `limit`.
    """
    return {
        "steps": steps,
        "model": {"path": str(model)},
        "data": {"mode": "offline", "train": str(data / "train.jsonl"), "max_prompt_tokens": 80},
        "reward": {"functions": [{"path": f"{ROOT}/examples/offline/reward.py:words_used"}]},
        "prompt_value": {"lr": 1e-3},
        "rollout": {"prompts_per_step": prompts, "group_size": 6, "max_completion_tokens": limit + 16},
        "learner": {"lr": lr, "schedule": "linear", "microbatch_tokens": 4096},
    }


def arm(name: str, settings: Settings, data: Path, seed: int) -> Settings:
    changes = ALL[name]
    file = changes["data"].get("train", "train.jsonl")
    merged = {**settings["data"], **changes["data"], "train": str(data / file)}
    return settings | {"algorithm": changes["algorithm"], "data": merged, "seed": seed}


Written = tuple[Row, list[list[int]], list[str]]


def written(model: Path, questions: Sequence[Row], limit: int) -> list[Written]:
    """Each held-out prompt with the completions that the model samples, as tokens and as text."""
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(str(model))
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    engine = NativeEngine(loaded, eos_token_ids=(tokenizer.eos_token_id,))
    requests = [
        RolloutRequest(
            Prompt(str(i), token_ids(tokenizer, row["prompt"]), ""), SamplingParams(SAMPLES, limit, seed=i)
        )
        for i, row in enumerate(questions)
    ]
    groups = generate(engine, requests)
    ids = [[list(c.token_ids) for c in group] for group in groups]
    texts = [[tokenizer.decode(i, skip_special_tokens=True) for i in group] for group in ids]
    return list(zip(questions, ids, texts, strict=True))


def distinct(texts: Sequence[str], n: int) -> float:
    """The number of distinct n-grams of words, divided by the number of all n-grams."""
    split = [text.lower().split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def measure(model: Path, data: Path, limit: int, keep: Path) -> dict[str, float]:
    """The figures of a model on held-out prompts, kept in the file `keep` and read from there next time."""
    if keep.is_file():
        return json.loads(keep.read_text())
    questions = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    found = written(model, questions, limit)
    texts = [text for _, _, those in found for text in those]
    lengths = [len(ids) for _, those, _ in found for ids in those]
    rewards = [one(text, row["words"]) for row, _, those in found for text in those]
    result = {
        "reward": round(statistics.mean(rewards), 4),
        **{f"distinct_{n}": round(distinct(texts, n), 4) for n in (1, 2, 3)},
        "length": round(statistics.mean(lengths), 2),
        "completions": len(texts),
    }
    keep.parent.mkdir(parents=True, exist_ok=True)
    keep.write_text(json.dumps(result))
    return result


def compare(
    settings: Settings, model: Path, data: Path, runs: Path, seed: int, arms: Sequence[str]
) -> list[Settings]:
    """Runs every method once. Returns one row for each, after the row of the model before training."""
    limit = settings["rollout"]["max_completion_tokens"] - 16
    before = measure(model, data, limit, runs / f"before-{seed}.json")
    rows: list[Settings] = [{"arm": "before", "seed": seed} | before]
    for name in arms:
        run = runs / f"{name}-{seed}"
        trained = train(arm(name, settings, data, seed), run)
        rows.append({"arm": name, "seed": seed} | measure(trained, data, limit, run / "measured.json"))
        sys.stdout.write(f"{rows[-1]}\n")
    return rows


def tiny(options: argparse.Namespace) -> list[Settings]:
    rows: list[Settings] = []
    model = taught(options.runs, options.teaching_steps)
    for seed in options.seeds:
        folder = options.runs / f"seed-{seed}"
        data = folder / "data"
        if not (data / "eval.jsonl").is_file():
            write_set(data, model, chat=False, prompts=300, held_out=64, seed=seed, max_tokens=16)
        settings = base(model, data, steps=options.steps or 80, prompts=8, limit=16, lr=options.lr or 1e-3)
        settings["model"]["dtype"] = "float32"
        rows += compare(settings, model, data, folder, seed, options.arms)
    return rows


def taught(folder: Path, steps: int) -> Path:
    """The tiny model after supervised steps on made-up sentences."""
    if not (folder / "lesson.jsonl").is_file():
        save_tiny_model(folder / "random", seed=0)
        write(folder / "lesson.jsonl", lesson(20_000, seed=0))
    return train(teaching(folder, steps), folder / "taught")


def teaching(folder: Path, steps: int) -> Settings:
    """Settings of the supervised steps by which the tiny model is taught; rewards are not used."""
    settings = base(folder / "random", folder, steps=steps, prompts=48, limit=16, lr=3e-3)
    settings["data"] |= {"train": str(folder / "lesson.jsonl"), "sampling": "completions"}
    settings["rollout"]["group_size"] = 1
    settings["model"]["dtype"] = "float32"
    return settings | {"algorithm": {"name": "sft"}, "reward": {}}


def small(options: argparse.Namespace) -> list[Settings]:
    data = ROOT / "examples" / "offline"
    steps, lr = options.steps or 30, options.lr or 2e-5
    settings = base(options.model, data, steps=steps, prompts=3, limit=32, lr=lr)
    # its hidden states are far larger than those of the two-layer model: at 1e-3 the sigmoid saturates
    settings["prompt_value"]["lr"] = 1e-4
    return compare(settings, options.model, data, options.runs, 0, options.arms)


def plot(options: argparse.Namespace) -> None:
    """Plots held-out reward against diversity: a point for each run, a cross for each mean."""
    count = len(options.results)
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 4.2), squeeze=False)
    for axis, file in zip(axes[0], options.results, strict=True):
        report = json.loads(file.read_text())
        for number, name in enumerate(row["arm"] for row in report["summary"]):
            runs = [row for row in report["rows"] if row["arm"] == name]
            x, y = ([row[key] for row in runs] for key in ("distinct_2", "reward"))
            colour, label = f"C{number - 1}" if number else "black", LABELS.get(name, name)
            axis.scatter(x, y, s=22, alpha=0.5, color=colour)
            mean = [statistics.mean(x)], [statistics.mean(y)]
            axis.scatter(*mean, marker="P", s=90, color=colour, label=label)
        axis.set(xlabel="distinct 2-grams (share)", ylabel="held-out reward", title=report["title"])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(options.out, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["tiny", "ablations", "small", "plot"])
    parser.add_argument("results", type=Path, nargs="*", help="of `plot`: the reports")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ALL)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--teaching-steps", type=int, default=600)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.task == "plot":
        return plot(options)
    options.arms = options.arms or list(ABLATIONS if options.task == "ablations" else ARMS)
    task: Callable[[argparse.Namespace], list[Settings]] = small if options.task == "small" else tiny
    rows = task(options)
    report = {
        "command": "python -m benchmarks.advantage_weighted " + " ".join(sys.argv[1:]),
        "title": TITLES[options.task],
        "machine": machine(),
        "summary": [summary(name, rows) for name in ("before", *options.arms)],
        "rows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return None


def summary(name: str, rows: Sequence[Settings]) -> Settings:
    """Mean and standard deviation over the seeds."""
    runs = [row for row in rows if row["arm"] == name]
    result: Settings = {"arm": name, "seeds": len(runs)}
    for key in ("reward", "distinct_1", "distinct_2", "distinct_3", "length"):
        values = [run[key] for run in runs]
        result[key] = round(statistics.mean(values), 4)
        if len(values) > 1:
            result[f"{key}_stdev"] = round(statistics.stdev(values), 4)
    return result


if __name__ == "__main__":
    main()
