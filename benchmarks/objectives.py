"""Two conflicting objectives on different scales: are both learned with the weighted sum, or with GDPO?

A completion has 16 characters. The weights of the objectives are not tuned: both are 1. Two tasks:

    compromise  `points`: 100 for each letter a, 90 for each b, in the mean; `share_of_b`: 0 to 1.
                The best for one is the worst for the other, but b is nearly as good as a for the first
    exclusive   `letters`: how many a, 0 to 16; `digits`: their share, 0 to 1.
                Each character serves one objective only: there is no compromise

Four arms, the same tiny random model, the same seeds:

    sum       GRPO on the weighted sum
    balanced  GRPO on the weighted sum with the weight of the first objective divided by its range
    gdpo      each objective normalised in its group, then the batch
    bound     `sum`, and the mean of the second objective must be at least 0.5 (a Lagrange multiplier)

Expected of `compromise`: to `sum` an a is worth 100 and a b 91, so share_of_b is given up in the end. To
`gdpo` the two are nearly the same for the points, and far apart for share_of_b: b, so 90 points and a share
of 1. `balanced` is the weighted sum for someone who knows the ranges: 1 against 1.9, so b too.

Expected of `exclusive`: `sum` is `letters` in all but name. Under `gdpo` the two z-scores cancel as soon as
every character is one or the other; training should come to rest at a mixture, but nothing holds it there.
`balanced` cancels exactly too.

Expected of `bound`: for any multiplier the optimum is an extreme, all of one objective or all of the other,
so the level oscillates around the bound, and its mean over the run is near the bound.

    python -m benchmarks.objectives --runs runs/objectives --out benchmarks/results/<machine>/objectives.json
    python -m benchmarks.objectives --figure docs/objectives.png \
        --out benchmarks/results/<machine>/objectives.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from rlhf.config.load import make_config

TOKENS = 16
ALGORITHMS = {"sum": "grpo", "balanced": "grpo", "gdpo": "gdpo", "bound": "grpo"}
TASKS = {"compromise": ("points", "share_of_b", 100), "exclusive": ("letters", "digits", TOKENS)}
"""Objectives of each task, and the range of the first; that of the second is 1."""


def points(completions: list[str]) -> list[float]:
    return [(100 * text.count("a") + 90 * text.count("b")) / TOKENS for text in completions]


def share_of_b(completions: list[str]) -> list[float]:
    return [text.count("b") / TOKENS for text in completions]


def letters(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def digits(completions: list[str]) -> list[float]:
    return [sum(map(str.isdigit, text)) / TOKENS for text in completions]


def save_model(folder: Path) -> None:
    """Writes a Llama of two layers with random weights, whose tokens are single characters."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", "Ġ", *map(chr, range(33, 127))]
    backend = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def run(task: str, arm: str, seed: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """The metrics of one run, which is trained unless that was done before."""
    from rlhf.trainer import Trainer

    one, other, span = TASKS[task]
    run_dir = folder / task / f"{arm}-{seed}"
    if not (run_dir / "report.html").is_file():
        settings = {
            "run_dir": str(run_dir),
            "steps": steps,
            "seed": seed,
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 32},
            "reward": {
                "functions": [
                    {
                        "path": f"benchmarks.objectives:{one}",
                        "weight": 1 / span if arm == "balanced" else 1.0,
                        "workers": 1,
                    },
                    {"path": f"benchmarks.objectives:{other}", "workers": 1},
                ],
                "constraints": [{"objective": other, "at_least": 0.5, "rate": 4.0}] if arm == "bound" else [],
                "success_objective": one,
            },
            "algorithm": {"name": ALGORITHMS[arm], "kl": {"coef": 0.0}},
            "rollout": {"prompts_per_step": 8, "group_size": 8, "max_completion_tokens": TOKENS},
            "learner": {"lr": 5e-3, "microbatch_tokens": 4096},
            "checkpoint": {"export": False, "every": 0},
            "monitor": {"sinks": []},
        }
        Trainer(make_config(settings)).run()
    return read_steps(run_dir)


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def measure(folder: Path, seeds: int, steps: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").is_file():
        save_model(folder / "model")
    (folder / "train.jsonl").write_text("".join(f'{{"prompt": "write {i}:"}}\n' for i in range(32)))
    last = max(1, steps // 10)
    tasks: dict[str, Any] = {}
    for task, (one, other, span) in TASKS.items():
        curves: dict[str, dict[str, list[list[float]]]] = {}
        for arm in ALGORITHMS:
            records = [run(task, arm, seed, steps, folder) for seed in range(seeds)]
            curves[arm] = {
                one: [[r[f"reward/{one}"] / span for r in record] for record in records],
                other: [[r[f"reward/{other}"] for r in record] for record in records],
            }
        summary = {
            arm: {
                name: summarize([statistics.mean(c[-last:]) for c in curve]) for name, curve in both.items()
            }
            for arm, both in curves.items()
        }
        tasks[task] = {"summary": summary, "curves": curves}
    return {"steps": steps, "seeds": seeds, "last_steps": last, "tasks": tasks}


def summarize(ends: list[float]) -> dict[str, Any]:
    """Mean and spread, over the seeds, of the means over the last steps."""
    spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
    return {"mean": statistics.mean(ends), "std": spread, "seeds": ends}


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = results["tasks"]
    shape = len(tasks), len(ALGORITHMS)
    figure, axes = pyplot.subplots(*shape, figsize=(12, 5.6), sharey=True, sharex=True, layout="constrained")
    titles = {
        "sum": "weighted sum, weights 1",
        "balanced": "sum, weights by range",
        "gdpo": "GDPO",
        "bound": "sum, second at least 0.5",
    }
    for line, (task, of_task) in enumerate(tasks.items()):
        row = axes[line]
        for axis, (arm, both) in zip(row, of_task["curves"].items(), strict=True):
            for (name, seeds), colour in zip(both.items(), ("#c0504d", "#1f77b4"), strict=True):
                for curve in seeds:
                    axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.35, linewidth=1)
                mean = [statistics.mean(values) for values in zip(*seeds, strict=True)]
                axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.2, label=name)
            axis.grid(alpha=0.25)
            if line == 0:
                axis.set_title(titles[arm])
            if line == len(tasks) - 1:
                axis.set_xlabel("step")
        row[0].set_ylabel(f"{task}: share of the range")
        row[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, help="where the runs are kept; not given: the figure alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    if options.runs is not None:
        torch.set_num_threads(1)
        results = measure(options.runs, options.seeds, options.steps)
        options.out.write_text(json.dumps(results) + "\n")
    if options.figure is not None:
        draw(json.loads(options.out.read_text()), options.figure)


if __name__ == "__main__":
    main()
