"""GRPO and PAPO_G at equal steps, on a model that guesses rather than uses the image: does PAPO change that?

The model, its images and its bias are those of benchmarks/small_looker.py. After each run the held-out
prompts are scored without sampling: the share whose most probable answer is correct and the mean probability
of the correct answer, for images that agree with the words and for images that contradict them, and the exact
perception KL, KL(policy || policy with masked images), at the answer. Finished runs are not repeated.

    grpo        no perception term
    papo_g      perception.coef 0.02, as PAPO's 3B run
    entropies   the same with the double entropy loss, 0.05 each, as PAPO's 7B run
    tenfold     perception.coef 0.2: the effect of too large a coefficient

Run: `python -m benchmarks.papo --data FOLDER --runs FOLDER --out FILE.json --plot FILE.png`, with the data of
`python -m benchmarks.small_looker FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from benchmarks.small_looker import CELL
from rlhf.config.load import make_config
from rlhf.config.model import ModelConfig
from rlhf.config.perception import PerceptionConfig
from rlhf.data.prompts import load_prompts
from rlhf.learn.perception.masked_passes import MaskedPasses
from rlhf.models.loading import load_policy
from rlhf.models.packing import pack
from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.processor import load_processor
from rlhf.trainer import Trainer

matplotlib.use("Agg")

ARMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "papo_g": {"coef": 0.02},
    "entropies": {"coef": 0.02, "entropy_coef": 0.05, "masked_entropy_coef": 0.05},
    "tenfold": {"coef": 0.2},
}
COLOURS = {"grpo": "#666666", "papo_g": "#1f77b4", "entropies": "#2ca02c", "tenfold": "#d62728"}
# a masked square is a whole cell of the grid: a smaller one would leave the colour of a shape visible
MASK = {"patch": CELL, "ratio": 0.6}
AT_ONCE = 60


def settings_of(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "run_dir": str(options.runs / f"{arm}-{seed}"),
        "steps": options.steps,
        "seed": seed,
        "model": {"path": str(options.data / "model"), "dtype": "float32"},
        "data": {"train": str(options.data / "train.jsonl"), "max_prompt_tokens": 48},
        "reward": {"functions": [{"path": "rlhf.rewards.builtin:exact_match"}]},
        "algorithm": {
            "name": "grpo",
            "clip_low": 0.2,
            "clip_high": 0.3,
            "clip_dual": 3.0,
            "kl": {"coef": 0.0},
        },
        "perception": {**MASK, **ARMS[arm]},
        "rollout": {"prompts_per_step": 24, "group_size": 5, "max_completion_tokens": 3},
        "learner": {"lr": options.lr, "microbatch_tokens": 8192},
        "checkpoint": {"every": 0},
        "monitor": {"sinks": []},
    }


@torch.no_grad()
def measure(model: Path, data: Path) -> dict[str, float]:
    """Figures on the held-out prompts, separately where the image agrees with the words and where not."""
    tokenizer = load_tokenizer(str(model))
    processor = load_processor(str(model), tokenizer)
    policy = load_policy(ModelConfig(path=str(model)), str(model), torch.device("cpu"), processor)
    section = PerceptionConfig.model_validate({"coef": 1.0, **MASK})
    assert section.term is not None
    masked_passes = MaskedPasses(policy, section.term, section, seed=0, steps=1)
    held_out = load_prompts(
        data / "eval.jsonl", tokenizer, image_column="images", max_prompt_tokens=48, processor=processor
    )
    found: dict[str, list[float]] = {}
    for first in range(0, len(held_out), AT_ONCE):
        prompts = held_out.prompts[first : first + AT_ONCE]
        # the answer is the first token; its probability is at the position that predicts it
        answers = torch.tensor([tokenizer(p.columns["answer"])["input_ids"][0] for p in prompts])
        packed = pack(
            [torch.tensor(p.token_ids) for p in prompts],
            [[answer[None]] for answer in answers],
            [p.pictures for p in prompts],
        )
        hidden = policy.hidden(packed)
        probabilities = (hidden @ policy.head.module.weight.T).softmax(-1)
        blind = policy.hidden(masked_passes.masked(packed, 0))
        kls = policy.divergence(packed, hidden, blind, temperature=1.0)
        right = (probabilities.argmax(-1) == answers).float()
        chances = probabilities.gather(-1, answers[:, None])[:, 0]
        for prompt, *values in zip(prompts, right.tolist(), chances.tolist(), kls.tolist(), strict=True):
            kind = "agree" if prompt.columns["agrees"] else "contradict"
            names = (f"accuracy_{kind}", f"probability_{kind}", "perception_kl")
            for name, value in zip(names, values, strict=True):
                found.setdefault(name, []).append(value)
    means = {name: statistics.mean(values) for name, values in found.items()}
    both = [found["accuracy_agree"], found["accuracy_contradict"]]
    return {"accuracy": statistics.mean([x for part in both for x in part]), **means}


def run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    settings = settings_of(arm, seed, options)
    folder = Path(settings["run_dir"])
    result = folder / "result.json"
    if not (folder / "report.html").is_file():
        Trainer(make_config(settings)).run()
    if not result.is_file():
        result.write_text(json.dumps(measure(folder / "model", options.data)))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {
        name: [step.get(name) for step in steps] for name in ("reward/mean", "perception/kl", "entropy")
    }
    signs = max((step.get("perception/signs", 0.0) for step in steps), default=0.0)
    return {"seed": seed, **json.loads(result.read_text()), "signs": signs, "curves": curves}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in runs[0] if name not in ("seed", "curves")]
    return {
        name: {
            "mean": round(statistics.mean(r[name] for r in runs), 4),
            "stdev": round(statistics.stdev(r[name] for r in runs), 4) if len(runs) > 1 else None,
            "each": [round(r[name], 4) for r in runs],
        }
        for name in names
    }


def plot(
    results: dict[str, list[dict[str, Any]]], start: dict[str, float], options: argparse.Namespace
) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), width_ratios=[0.9, 1.3, 1, 1])
    _show_pictures(axes[0], options.data)
    names = {"accuracy_contradict": "picture contradicts words", "accuracy_agree": "picture agrees"}
    for i, name in enumerate(names):
        axes[1].axhline(start[name], color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        for j, (arm, runs) in enumerate(results.items()):
            values = [r[name] for r in runs]
            at = i + 0.8 * (j + 0.5) / len(results) - 0.4
            axes[1].bar(at, statistics.mean(values), 0.75 / len(results), color=COLOURS[arm], alpha=0.75)
            axes[1].plot([at] * len(values), values, "o", color="black", markersize=3)
    axes[1].set_xticks(range(len(names)), list(names.values()))
    axes[1].set(title="held-out accuracy (dashes: before)", ylim=(0, 1.02))
    for axis, curve, title in (
        (axes[2], "reward/mean", "reward in training"),
        (axes[3], "perception/kl", "perception KL, nats a token"),
    ):
        for arm, runs in results.items():
            curves = [smooth(r["curves"][curve]) for r in runs if r["curves"][curve][0] is not None]
            if curves:
                steps = range(1, len(curves[0]) + 1)
                axis.plot(steps, [statistics.mean(x) for x in zip(*curves, strict=True)], color=COLOURS[arm])
                axis.fill_between(
                    steps,
                    *zip(*((min(x), max(x)) for x in zip(*curves, strict=True)), strict=True),
                    color=COLOURS[arm],
                    alpha=0.15,
                    linewidth=0,
                )
        axis.set(title=title, xlabel="step")
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[arm]) for arm in results]
    figure.legend(handles, list(results), loc="lower center", ncols=len(results), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(options.plot, dpi=110)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Means over the last few steps."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _show_pictures(axis: Any, data: Path) -> None:
    rows = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    chosen = [
        next(r for r in rows if r["agrees"] == a and k in json.dumps(r["prompt"]))
        for k in ("colour", "count", "place")
        for a in (True, False)
    ]
    axis.set_axis_off()
    for i, row in enumerate(chosen):
        image, text = row["prompt"][0]["content"]
        x, y = i % 2 * 1.9, 2 - i // 2
        where = (x + 0.19, x + 0.81, y * 1.15 + 0.33, y * 1.15 + 0.95)
        axis.imshow(Image.open(data / image["image"]), extent=where)
        axis.text(x + 0.5, y * 1.15 + 0.08, f"{text['text']}: {row['answer']}", ha="center", fontsize=7.5)
    axis.set(title="held-out pictures", xlim=(-0.5, 3.4), ylim=(0, 3.45), aspect="equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    # all arms of one seed before the next, so that an interrupted benchmark compares all arms
    runs = {(seed, arm): run(arm, seed, options) for seed in options.seeds for arm in options.arms}
    results = {arm: [runs[seed, arm] for seed in options.seeds] for arm in options.arms}
    start = measure(options.data / "model", options.data)
    report = {
        "question": "does PAPO_G look more than GRPO at equal steps?",
        "steps": options.steps,
        "lr": options.lr,
        "mask": MASK,
        "before": {name: round(value, 4) for name, value in start.items()},
        "arms": {arm: {"perception": ARMS[arm], **summary(each)} for arm, each in results.items()},
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(results, start, options)


if __name__ == "__main__":
    main()
