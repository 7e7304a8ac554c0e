"""One iteration of tree pairs and DPO behind fine-tuning, on calls of a calculator with wrong arguments.

A Llama of about 0.2 million weights, a token for each character, is taught to answer `482+57=` with
`[add(a=482, b=57)]` and then with what the calculator says, by supervised steps that stop when half of the
calls are right: what it gets wrong are the digits of the arguments. Then, each from that model, and with as
many samples behind each question:

    tree     pairs of next steps (`rlhf pairs tree`), whose prompt is the common path, and DPO on them
    whole    the same command with trees of depth 1: pairs of whole calls, and DPO on them

and the share of held-out questions that are answered rightly, greedily. A seed is that of everything: the
model, its lessons, the questions and the search. Steps that are finished in FOLDER are read, not repeated.

    python -m benchmarks.tool_pairs --runs FOLDER --out FILE.json --figure FILE.png
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib import pyplot as plt
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.characters import tokenizer
from benchmarks.runs import ROOT, machine
from rlhf.cli import main as rlhf
from rlhf.commands.evaluate import Request, run_evaluation

BATCH, LR = 96, 3e-3
EVERY, ENOUGH, MOST = 3, 0.5, 300
"""Steps between looks whether fine-tuning is enough, the share of right calls that is, and the most steps."""
TRAIN, HELD_OUT = 160, 500
STEPS, BETA = 30, 0.1
RATES = (2e-5, 1e-4)
"""Learning rates of DPO: on another seed (9) the first was the best of three, and the second too high."""
DEPTHS = {
    # nodes of 4 actions with 2 completions behind each: 5 x 4 x 2 + 2, and 1 x 20 x 2 + 2
    "tree": {"depth": 3, "iterations": 5, "actions": 4},
    "whole": {"depth": 1, "iterations": 1, "actions": 20},
}
CHARACTERS = [*"0123456789", *"abcdefghijklmnopqrstuvwxyz", *"+-=[](), :T"]
TEMPLATE = (
    "{% if tools %}T{% endif %}{% for message in messages %}"
    "{{ message['role'][0] + ':' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TOOL = {"+": "add", "-": "subtract"}


def questions(count: int, rng: random.Random) -> list[tuple[int, str, int]]:
    """Different questions about numbers of one to four digits."""
    found: dict[tuple[int, str, int], None] = {}
    while len(found) < count:
        first, second = (rng.randrange(10 ** (d - 1), 10**d) for d in rng.choices((1, 2, 3, 4), k=2))
        found[first, rng.choice("+-"), second] = None
    return list(found)


def answer(question: tuple[int, str, int]) -> int:
    first, sign, second = question
    return first + second if sign == "+" else first - second


def conversation(question: tuple[int, str, int]) -> tuple[str, str, str, str]:
    """Question, call, what the calculator says, and answer, as the chat template writes them."""
    a, sign, b = question
    found = answer(question)
    return f"Tu:{a}{sign}{b}=a:", f"[{TOOL[sign]}(a={a}, b={b})]<end>", f"t:{found}a:", f"{found}<end>"


def lesson_of(words: PreTrainedTokenizerFast, turns: list[tuple[str, str, str, str]]) -> tuple[Any, Any]:
    """Conversations as a batch, and labels for what the assistant says: the call, and the answer."""
    texts = ["".join(four) for four in turns]
    batch = words(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = torch.full_like(batch.input_ids, -100)
    for row, four in enumerate(turns):
        start = 0
        for number, turn in enumerate(four):
            end = start + len(turn) - turn.count("<end>") * (len("<end>") - 1)
            if number % 2 == 1:
                labels[row, start:end] = batch.input_ids[row, start:end]
            start = end
    return batch, labels


def teach(words: PreTrainedTokenizerFast, withheld: set[Any], seed: int) -> LlamaForCausalLM:
    """The model after supervised steps on conversations, none of which is one of `withheld`.

    The steps end when `ENOUGH` of the next lesson's calls are right, greedily.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=160,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rng = random.Random(seed + 1000)
    for lesson in range(MOST):
        turns = [conversation(q) for q in questions(BATCH, rng) if q not in withheld]
        batch, labels = lesson_of(words, turns)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (lesson + 1) / 50)
        output = model(**batch, labels=labels)
        wrong = (output.logits[:, :-1].argmax(-1) != labels[:, 1:]) & (labels[:, 1:] != -100)
        if lesson % EVERY == 0 and (~wrong.any(-1)).float().mean() >= ENOUGH:
            break
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def config_of(folder: Path, seed: int) -> dict[str, Any]:
    """The settings of search and evaluation."""
    calculator = ROOT / "examples" / "calculator"
    return {
        "run_dir": str(folder / "run"),
        "steps": 1,
        "seed": seed,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_prompt_tokens": 32,
        },
        "environment": {
            "path": f"{calculator / 'environment.py'}:Calculator",
            "max_turns": 2,
            "calls": "python",
            "workers": 1,
        },
        "reward": {"functions": [{"path": f"{calculator / 'reward.py'}:right", "batch": "step"}]},
        "algorithm": "grpo",
        # a value is what the model makes of a step when it is nearly sure; steps are drawn more widely
        "rollout": {
            "prompts_per_step": 16,
            "group_size": 2,
            "max_completion_tokens": 56,
            "temperature": 0.5,
        },
        "eval": {"samples": 1},
        # `[add(a=`, `482, b=` and all the rest
        "tree": {"step_parts": 2, "step_tokens": 16, "rollouts": 2, "temperature": 1.0},
    }


def prepare(folder: Path, seed: int) -> None:
    """Model, questions and config of a seed, unless they are there."""
    if (folder / "config.yaml").is_file():
        return
    words = tokenizer(CHARACTERS)
    words.chat_template = TEMPLATE
    asked = questions(TRAIN + HELD_OUT, random.Random(seed))
    model = teach(words, set(asked), seed)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for name, part in (("train", asked[:TRAIN]), ("eval", asked[TRAIN:])):
        lines = [
            json.dumps(
                {"prompt": [{"role": "user", "content": f"{q[0]}{q[1]}{q[2]}="}], "answer": str(answer(q))}
            )
            for q in part
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(folder, seed), sort_keys=False))


def evaluated(model: Path, folder: Path) -> float:
    """The share of held-out questions that are answered rightly, one greedy sample each."""
    out = model / "eval.json"
    if not out.is_file():
        request = Request(str(model), config=str(folder / "config.yaml"), greedy=True, out=str(out))
        list(run_evaluation(request))
    return json.loads(out.read_text())["accuracy"]["value"]


def search(folder: Path, name: str) -> dict[str, Any]:
    """Makes the pairs; what the search counted."""
    tree = [f"tree.{key}={value}" for key, value in DEPTHS[name].items()]
    out = folder / f"{name}_pairs"
    called(["pairs", "tree", str(folder / "config.yaml"), "--out", str(out), *tree])
    summary = json.loads((out / "summary.json").read_text())
    return {key: summary[key] for key in ("pairs", "dropped", "counts")}


def learn(folder: Path, name: str, seed: int, rate: float) -> dict[str, Any]:
    """Learns from the pairs, and evaluates."""
    run = folder / f"{name}_dpo_{rate}"
    settings = {
        "run_dir": run,
        "seed": seed,
        "steps": STEPS,
        "model.path": folder / "model",
        "model.dtype": "float32",
        "data.train": folder / f"{name}_pairs" / "pairs.jsonl",
        "data.eval": "null",
        "reward.functions": "[]",
        "algorithm.beta": BETA,
        "learner.lr": rate,
        "checkpoint.every": 0,
        "monitor.sinks": "[]",
    }
    if not (run / "model").is_dir():
        called(["train", str(ROOT / "configs" / "dpo.yaml"), *(f"{k}={v}" for k, v in settings.items())])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = steps[-5:]
    return {
        "accuracy": evaluated(run / "model", folder),
        "pair_accuracy": round(statistics.mean(step["pairs/accuracy"] for step in last), 3),
        "chosen_logratio": round(statistics.mean(step["pairs/chosen_logratio"] for step in last), 3),
    }


def called(arguments: list[str]) -> None:
    if rlhf(arguments) != 0:
        raise SystemExit(f"rlhf {' '.join(arguments)} failed")


def measured(folder: Path, seed: int) -> dict[str, Any]:
    """All of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, seed)
    row: dict[str, Any] = {"seed": seed, "accuracy": {"sft": evaluated(folder / "model", folder)}}
    for name in DEPTHS:
        row[name] = search(folder, name)
        for rate in RATES:
            learned = learn(folder, name, seed, rate)
            row["accuracy"][f"{name} {rate:g}"] = learned.pop("accuracy")
            row[name][f"dpo {rate:g}"] = learned
    return row


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy of each seed, before and after."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    names = ["sft", *(f"{name} {rate:g}" for rate in RATES for name in DEPTHS)]
    for row in rows:
        axes.plot(names, [row["accuracy"][n] for n in names], "o:", label=f"seed {row['seed']}")
    axes.set_ylabel("held-out questions answered rightly")
    axes.set_xlabel("fine-tuning alone; pairs of steps, of whole calls, and DPO's learning rate")
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tree pairs and DPO behind fine-tuning.")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows.append(measured(options.runs / f"seed_{seed}", seed))
        print(json.dumps(rows[-1]["accuracy"]), flush=True)  # noqa: T201
    values = {name: [row["accuracy"][name] for row in rows] for name in rows[0]["accuracy"]}
    means = {name: [round(statistics.mean(v), 4), min(v), max(v)] for name, v in values.items()}
    result = {
        "command": " ".join(["python -m benchmarks.tool_pairs", *sys.argv[1:]]),
        "machine": machine(),
        "settings": {"steps": STEPS, "beta": BETA, **DEPTHS},
        "accuracy (mean, lowest, highest)": means,
        "seeds": rows,
    }
    print(json.dumps(means, indent=1))  # noqa: T201
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
