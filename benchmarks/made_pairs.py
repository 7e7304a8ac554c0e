"""Do pairs that `rlhf pairs` makes teach a small model to look, more than its right answers alone?

1. bdhs. The model and the pictures of benchmarks/small_looker.py, which guesses from the words. DPO on pairs
   whose rejected answer the model itself wrote with its image tokens hidden, against DPO with another answer
   drawn at random, and against imitation of the right answers.
2. counter. A model of the same size, taught on drawn scenes; in nine of ten of them the colour tells the
   number (red means two, and so on). DPO on scenes beside their counterfactuals, against imitation of the
   captions of the original scenes, and of both. Measured: in how many held-out scenes the right number is the
   likeliest word, where the colour tells it, and in their counterfactuals, where it does not.

Finished runs are not repeated. Run: `python -m benchmarks.made_pairs --data FOLDER --runs FOLDER
--out FILE.json --plot FILE.png`, with the data of `python -m benchmarks.small_looker FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.papo import measure, summary
from benchmarks.small_looker import PATCH, SPECIAL, TEMPLATE, TEMPLATE_PREFIX, USUAL, untaught
from rlhf.cli import main as rlhf
from rlhf.config.load import make_config
from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.processor import load_processor
from rlhf.pairs.counter import KINDS, NUMBERS, Counter, Scene
from rlhf.trainer import Trainer

matplotlib.use("Agg")

SIDE = 32
NUMBER_OF = {"red": 2, "green": 3, "blue": 4, "yellow": 5}
"""What the colour of a scene suggests."""
LESSONS, POOL, BATCH, LR = 600, 1500, 32, 3e-3
ENOUGH = 0.4
"""The model is taught until it is right about so many counterfactuals: it sees a little."""
HELD_OUT, TEACHING, TESTING = 150, 9, 5
TAUGHT, BIASED = 0.8, 0.9
"""Share of scenes in which the colour tells the number: those that the model is taught on, and later ones."""
ARMS = {
    "bdhs": ("sft", "dpo random", "dpo bdhs"),
    "counter": ("sft positives", "sft both", "dpo counter"),
}
COLOURS = ("#666666", "#2ca02c", "#1f77b4")
FIGURES = {"bdhs": "accuracy_contradict", "counter": "accuracy_swapped"}


def is_usual(scene: Scene) -> bool:
    return scene.numbers[0] == NUMBER_OF[scene.things[0][0]]


def scenes_of(seed: int, count: int, *, usual: float) -> list[Scene]:
    """Scenes in a share `usual` of which the colour tells the number."""
    rng, counter, found, number = random.Random(seed), Counter(seed, ("count",), SIDE), list[Scene](), 0
    while len(found) < count:
        wanted = rng.random() < usual
        while is_usual(scene := counter.scene(number)) != wanted:
            number += 1
        number += 1
        found.append(scene)
    return found


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the words of scenes, and the processor of their pictures."""
    scenes = scenes_of(0, 400, usual=0.5)
    words = sorted({word for scene in scenes for word in f"{scene.question} {scene.caption}".split()})
    backend = Tokenizer(
        WordLevel({w: i for i, w in enumerate([*SPECIAL, "answer", *words])}, unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size).save_pretrained(folder)
    return made


def batch_of(scenes: Sequence[Scene], processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts, pictures and captions as inputs, all of one length, and labels of the captions alone."""
    texts = [f"{TEMPLATE_PREFIX} {scene.question} answer {scene.caption} <end>" for scene in scenes]
    encoded = processor(text=texts, images=[scene.draw() for scene in scenes], return_tensors="pt")
    labels = torch.full_like(encoded["input_ids"], -100)
    # There are NUMBER COLOUR SHAPES. <end>
    labels[:, -6:] = encoded["input_ids"][:, -6:]
    return dict(encoded), labels


Batch = tuple[dict[str, Tensor], Tensor]


def held_out(processor: Any) -> dict[str, Batch]:
    """Scenes in which the colour tells the number, and their counterfactuals."""
    scenes = scenes_of(TESTING, HELD_OUT, usual=1.0)
    swapped = [scene.swapped() for scene in scenes]
    return {"original": batch_of(scenes, processor), "swapped": batch_of(swapped, processor)}


@torch.no_grad()
def accuracies(model: Any, batches: dict[str, Batch]) -> dict[str, float]:
    """Shares of scenes whose number is the likeliest of all words behind "There are", and its probability."""
    found: dict[str, float] = {}
    for name, (inputs, labels) in batches.items():
        # the logits before the number, which is the fourth token from the end
        probabilities, numbers = model(**inputs).logits[:, -5].softmax(-1), labels[:, -4]
        found[f"accuracy_{name}"] = (probabilities.argmax(-1) == numbers).float().mean().item()
        found[f"probability_{name}"] = probabilities.gather(-1, numbers[:, None]).mean().item()
    return found


def teach(folder: Path) -> None:
    """Writes a model that sees a little, and guesses the number by the colour where it does not."""
    folder.mkdir(parents=True, exist_ok=True)
    model = untaught(write_tokenizer(folder))
    model.config.save_pretrained(folder)
    processor = processor_of(folder)
    pool, labels = batch_of(scenes_of(TEACHING, POOL, usual=TAUGHT), processor)
    pixels = pool.pop("pixel_values").unflatten(0, (POOL, -1))
    test = held_out(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for lesson in range(LESSONS):
        some = torch.randperm(POOL)[:BATCH]
        inputs = {name: tensor[some] for name, tensor in pool.items()}
        logits = model(**inputs, pixel_values=pixels[some].flatten(0, 1)).logits[:, -7:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[some, -6:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if lesson % 25 == 24:
            found = accuracies(model, test)
            print(f"lesson {lesson + 1}: {found}", flush=True)  # noqa: T201
            if found["accuracy_swapped"] >= ENOUGH:
                break
    model.save_pretrained(folder)


def processor_of(folder: Path) -> Any:
    processor = load_processor(str(folder), load_tokenizer(str(folder)))
    assert processor is not None
    return processor._processor


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def command(*arguments: object) -> None:
    status = rlhf(["pairs", *map(str, arguments)])
    assert status == 0, arguments


def bdhs_data(seed: int, options: argparse.Namespace) -> dict[str, str]:
    """The data of each arm, by its name."""
    folder = options.runs / f"bdhs-data-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    golds = lines_of(options.data / "train.jsonl")
    for gold in golds:
        image = gold["prompt"][0]["content"][0]
        image["image"] = str((options.data / image["image"]).absolute())
        gold["completion"] = gold["answer"]
    file = write_lines(folder / "gold.jsonl", golds)
    limits = ("data.max_prompt_tokens=48", "rollout.max_completion_tokens=3")
    model = options.data / "model"
    command("bdhs", model, "--data", file, "--out", folder / "pairs", "--seed", seed, *limits)
    rng, drawn = random.Random(seed), list[dict[str, Any]]()
    for gold in golds:
        kind = gold["prompt"][0]["content"][1]["text"].split()[0]
        others = [answer for answer in USUAL[kind].values() if answer != gold["answer"]]
        drawn.append({"prompt": gold["prompt"], "chosen": gold["answer"], "rejected": rng.choice(others)})
    return {
        "sft": file,
        "dpo random": write_lines(folder / "random.jsonl", drawn),
        "dpo bdhs": str(folder / "pairs" / "pairs.jsonl"),
    }


def counter_data(seed: int, options: argparse.Namespace) -> dict[str, str]:
    """The data of each arm, by its name: scenes of which nine in ten are as the colour suggests."""
    folder = options.runs / f"counter-data-{seed}"
    shape = ("--kinds", "count", "--size", SIDE, "--scenes", 1600, "--seed", 100 + seed)
    command("counter", "--out", folder, *shape)
    lines = lines_of(folder / "pairs.jsonl")
    scenes = list(zip(lines[::2], lines[1::2], strict=True))

    def usual(pair: tuple[dict[str, Any], dict[str, Any]]) -> bool:
        colour = pair[0]["prompt"][0]["content"][1]["text"].split()[2]
        return pair[0]["answer"] == NUMBERS[NUMBER_OF[colour]]

    most = [pair for pair in scenes if usual(pair)]
    rare = [pair for pair in scenes if not usual(pair)][: round(len(most) * (1 / BIASED - 1))]
    kept = [line for pair in sorted([*most, *rare], key=lambda p: p[0]["scene"]) for line in pair]
    answers = [{"prompt": line["prompt"], "completion": line["chosen"]} for line in kept]
    return {
        "sft positives": write_lines(folder / "positives.jsonl", answers[::2]),
        "sft both": write_lines(folder / "both.jsonl", answers),
        "dpo counter": write_lines(folder / "kept.jsonl", kept),
    }


def settings_of(arm: str, folder: Path, model: Path, data: str, seed: int, steps: int) -> dict[str, Any]:
    algorithm = {"name": "dpo", "beta": 0.1} if arm.startswith("dpo") else {"name": "sft"}
    together = {"together_column": "scene"} if arm == "dpo counter" else {}
    return {
        "run_dir": str(folder),
        "steps": steps,
        "seed": seed,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"mode": "offline", "train": data, "max_prompt_tokens": 48, **together},
        "algorithm": algorithm,
        "rollout": {"prompts_per_step": 24, "max_completion_tokens": 8},
        "learner": {"lr": 1e-3, "microbatch_tokens": 8192},
        "checkpoint": {"every": 0},
        "monitor": {"sinks": []},
    }


def of_question(
    question: str,
    model: Path,
    data: Callable[..., dict[str, str]],
    judge: Callable[[Path], dict[str, float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of each arm, and those before."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS[question]}
    for seed in options.seeds:
        files = data(seed, options)
        for arm, found in results.items():
            folder = options.runs / f"{question}-{arm.replace(' ', '-')}-{seed}"
            result = folder / "result.json"
            if not result.is_file():
                settings = settings_of(arm, folder, model, files[arm], seed, options.steps)
                Trainer(make_config(settings)).run()
                result.write_text(json.dumps(judge(folder / "model")))
            found.append({"seed": seed, **json.loads(result.read_text())})
    before = {name: round(value, 4) for name, value in judge(model).items()}
    return {"before": before, "arms": {arm: summary(runs) for arm, runs in results.items()}}


def judge_counts(folder: Path) -> dict[str, float]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return accuracies(model, held_out(processor_of(folder)))


def plot(report: dict[str, Any], file: Path) -> None:
    figure, (pictures, *axes) = plt.subplots(1, 3, figsize=(13, 3.4))
    show_scenes(pictures)
    titles = {"bdhs": "picture contradicts words", "counter": "counterfactual picture"}
    for axis, (question, figures) in zip(axes, FIGURES.items(), strict=True):
        arms = report[question]["arms"]
        for at, (arm, colour) in enumerate(zip(arms, COLOURS, strict=True)):
            axis.bar(at, arms[arm][figures]["mean"], 0.7, color=colour, alpha=0.75)
            each = arms[arm][figures]["each"]
            axis.plot([at] * len(each), each, "o", color="black", markersize=3)
        axis.axhline(report[question]["before"][figures], color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(arms)), list(arms))
        axis.set(title=f"held-out accuracy, {titles[question]}\n(dashes: before)", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def show_scenes(axis: Any) -> None:
    """A scene of each kind over its counterfactual, with the word that differs."""
    for column in range(len(KINDS)):
        scene = Counter(2, size=64).scene(column)
        for row, each in enumerate((scene, scene.swapped())):
            x, y = 1.1 * column, -1.25 * row
            axis.imshow(each.draw(), extent=(x, x + 1, y, y + 1))
            axis.text(x + 0.5, y - 0.12, each.word, ha="center", fontsize=8)
    axis.set(title="scenes over their counterfactuals", xlim=(0, 3.2), ylim=(-1.5, 1), aspect="equal")
    axis.set_axis_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("data", "runs", "out", "plot"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    counting = options.runs / "counting"
    if not (counting / "model.safetensors").is_file():
        teach(counting)
    looks = measure, options.data / "model"
    report: dict[str, Any] = {"steps": options.steps, "seeds": options.seeds}
    report["bdhs"] = of_question("bdhs", looks[1], bdhs_data, lambda m: measure(m, options.data), options)
    report["counter"] = of_question("counter", counting, counter_data, judge_counts, options)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, options.plot)


if __name__ == "__main__":
    main()
