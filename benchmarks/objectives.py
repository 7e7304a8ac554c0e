"""Two objectives in conflict, on scales of their own: does the weighted sum keep both, does GDPO?

Every character of a completion can serve one of them only. `letters` counts the letters a (0 to 16);
`digits` is the share of digits (0 to 1). Nobody has tuned their weights: both are 1. Three arms, the same
tiny random model, the same seeds:

    sum      GRPO on the weighted sum
    balanced GRPO on the weighted sum with the weight of `letters` divided by its range, 1/16
    gdpo     each objective normalised in its group, then the batch

Expected: `sum` is `letters` in all but name, so its digits vanish. Under `gdpo` both z-scores count the same,
and where every character is one or the other they cancel, so training comes to rest at a mixture. `balanced`
shows what a person who knows the ranges gets from the sum: neither side is favoured, but nothing holds a
mixture either, so which one wins may depend on the seed.

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

from rlhf.config import make_config

TOKENS = 16
ARMS: dict[str, tuple[str, float]] = {
    "sum": ("grpo", 1.0),
    "balanced": ("grpo", 1 / TOKENS),
    "gdpo": ("gdpo", 1.0),
}


def letters(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def digits(completions: list[str]) -> list[float]:
    return [sum(map(str.isdigit, text)) / TOKENS for text in completions]


def save_model(folder: Path) -> None:
    """A random Llama of two layers that knows single characters."""
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


def run(arm: str, seed: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """The records of one run; one that was finished before is not repeated."""
    from rlhf.trainer import Trainer

    algorithm, weight = ARMS[arm]
    run_dir = folder / f"{arm}-{seed}"
    if not (run_dir / "report.html").is_file():
        settings = {
            "run_dir": str(run_dir),
            "steps": steps,
            "seed": seed,
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 32},
            "reward": {
                "functions": [
                    {"path": "benchmarks.objectives:letters", "weight": weight, "workers": 1},
                    {"path": "benchmarks.objectives:digits", "workers": 1},
                ]
            },
            "algorithm": {"name": algorithm, "kl": {"coef": 0.0}},
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
    curves: dict[str, Any] = {}
    for arm in ARMS:
        records = [run(arm, seed, steps, folder) for seed in range(seeds)]
        curves[arm] = {
            "letters": [[r["reward/letters"] / TOKENS for r in record] for record in records],
            "digits": [[r["reward/digits"] for r in record] for record in records],
        }
    last = max(1, steps // 10)
    summary = {
        arm: {
            name: {
                "mean": statistics.mean(ends := [statistics.mean(c[-last:]) for c in curve]),
                "std": statistics.stdev(ends) if len(ends) > 1 else 0.0,
                "seeds": ends,
            }
            for name, curve in both.items()
        }
        for arm, both in curves.items()
    }
    return {"steps": steps, "last_steps": last, "summary": summary, "curves": curves}


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ARMS), figsize=(10, 3.2), sharey=True, layout="constrained")
    titles = {"sum": "weighted sum", "balanced": "sum, weight of letters 1/16", "gdpo": "GDPO"}
    for axis, (arm, both) in zip(axes, results["curves"].items(), strict=True):
        for name, colour in (("letters", "#c0504d"), ("digits", "#1f77b4")):
            for curve in both[name]:
                axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.35, linewidth=1)
            mean = [statistics.mean(values) for values in zip(*both[name], strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.2, label=name)
        axis.set_title(titles[arm])
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("share of the 16 characters")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, help="where the runs are kept; not given: the figure alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    if options.runs is not None:
        torch.set_num_threads(1)
        results = measure(options.runs, options.seeds, options.steps)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.figure is not None:
        draw(json.loads(options.out.read_text()), options.figure)


if __name__ == "__main__":
    main()
