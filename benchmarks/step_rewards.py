"""A chain of sums whose steps may be wrong: what a reward of each step does that one of the outcome does not.

    prompt        3 0 2 3 :
    completion    3 0 3 ; 3 2 0 ; again 3 2 1 ; 1 3 0 ; = 0 .

Each step adds the next digit, modulo 4, to the last result; `again` repeats the last one. A step is right
where its result is that of the digits so far, so that behind an error every step is wrong until one repeats
it rightly. The two-layer model is taught by chains in which a sum is wrong with a probability of .2, and is
repeated, right or wrong, with one of .35. Then it learns by REINFORCE++ and 30 updates of 16 prompts, from

    outcome         1 where the last number is the sum of all digits
    outcome + sum   the same, and -.2 for each wrong step, at the end of the completion
    outcome + steps the same, each -.2 at the end of its step

Measured on 8 samples of each of 64 held-out prompts.

    python -m benchmarks.step_rewards --runs FOLDER --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.advantage_weighted import train
from benchmarks.offline_data import Row, token_ids, write
from benchmarks.runs import machine
from rlhf.models.pretrained import load_tokenizer
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.native.engine import NativeEngine
from rlhf.types import Prompt

DIGITS, MODULO, WRONG, AGAIN, PENALTY, LIMIT = 4, 4, 0.2, 0.35, 0.2, 64
LESSONS, STEPS, LR, HELD_OUT, SAMPLES = 400, 30, 2e-4, 64, 8
SEEDS = (0, 1, 2)
MODULE = "benchmarks.step_rewards"
ARMS: dict[str, list[dict[str, Any]]] = {
    "outcome": [{"path": f"{MODULE}:outcome"}],
    "outcome + sum": [{"path": f"{MODULE}:outcome"}, {"path": f"{MODULE}:wrong_steps", "weight": PENALTY}],
    "outcome + steps": [{"path": f"{MODULE}:outcome"}, {"path": f"{MODULE}:each_step", "weight": PENALTY}],
}


def sums(digits: Sequence[int]) -> list[int]:
    """The sums of the first two, three, ... digits, modulo 4."""
    return [sum(digits[:count]) % MODULO for count in range(2, len(digits) + 1)]


def judged(text: str, digits: Sequence[int]) -> list[tuple[int, bool]]:
    """Where each step of a chain ends in its text, in characters, and whether it is right."""
    end, number, steps, expected = 0, -1, list[tuple[int, bool]](), sums(digits)
    for part in text.split(";")[:-1]:
        end += len(part) + 1
        words = part.split()
        again = words[:1] == ["again"]
        number += not again
        right = 0 <= number < len(expected) and words[-1:] == [str(expected[number])]
        steps.append((end, right))
    return steps


def outcome(completions: Sequence[str], digits: Sequence[Sequence[int]]) -> list[float]:
    """1 where the chain ends with the sum of all digits."""
    return [
        float(text.split("=")[-1].split() == [str(sum(given) % MODULO), "."])
        for text, given in zip(completions, digits, strict=True)
    ]


def each_step(completions: Sequence[str], digits: Sequence[Sequence[int]]) -> list[list[tuple[int, float]]]:
    """-1 for each wrong step, where it ends."""
    pairs = zip(completions, digits, strict=True)
    return [[(end, float(right) - 1.0) for end, right in judged(text, given)] for text, given in pairs]


def wrong_steps(completions: Sequence[str], digits: Sequence[Sequence[int]]) -> list[float]:
    """Minus the number of wrong steps."""
    return [sum(score for _, score in steps) for steps in each_step(completions, digits)]


def prompt_of(digits: Sequence[int]) -> str:
    return " ".join([*map(str, digits), ":"])


def chain(digits: Sequence[int], rng: random.Random) -> str:
    """A chain as the model is taught: with errors and repetitions."""
    said, result = list[str](), digits[0]
    for digit in digits[1:]:
        start, word = result, ""
        while True:
            error = rng.randrange(1, MODULO) if rng.random() < WRONG else 0
            result = (start + digit + error) % MODULO
            said.append(f"{word}{start} {digit} {result} ;")
            word = "again "
            if rng.random() >= AGAIN:
                break
    return " ".join([*said, f"= {result} ."])


def rows_of(count: int, seed: int, rng: random.Random | None = None) -> list[Row]:
    """Prompts, with a chain where `rng` writes one."""
    digits = random.Random(seed)
    made = [[digits.randrange(MODULO) for _ in range(DIGITS)] for _ in range(count)]
    rows: list[Row] = [{"prompt": prompt_of(given), "digits": given} for given in made]
    if rng is None:
        return rows
    return [row | {"completion": chain(row["digits"], rng), "reward": 1.0} for row in rows]


def save_tiny_model(folder: Path) -> None:
    """Two layers of random weights and a tokenizer with a token a word, in the Hugging Face layout."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", ":", ";", "=", ".", "again", *map(str, range(MODULO))]
    backend: Any = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def settings(model: Path, data: Path, steps: int, lr: float, prompts: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "max_prompt_tokens": 8},
        "rollout": {"prompts_per_step": prompts, "group_size": 8, "max_completion_tokens": LIMIT},
        "learner": {"lr": lr, "schedule": "linear", "microbatch_tokens": 8192},
    }


def taught(folder: Path) -> Path:
    """The model after supervised steps on chains with errors."""
    if not (folder / "lesson.jsonl").is_file():
        save_tiny_model(folder / "random")
        write(folder / "lesson.jsonl", rows_of(20_000, 0, random.Random(0)))
        write(folder / "train.jsonl", rows_of(2000, 1))
    made = settings(folder / "random", folder / "lesson.jsonl", LESSONS, 3e-3, 48)
    made["data"] |= {"mode": "offline", "sampling": "completions", "long_prompts": "skip"}
    made["rollout"]["group_size"] = 1
    return train(made | {"algorithm": {"name": "sft"}, "reward": {}}, folder / "taught")


def measure(model: Path) -> dict[str, float]:
    """What the model writes for held-out prompts."""
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(str(model))
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    engine = NativeEngine(loaded, eos_token_ids=(tokenizer.eos_token_id,))
    rows = rows_of(HELD_OUT, 2)
    requests = [
        RolloutRequest(
            Prompt(str(i), token_ids(tokenizer, row["prompt"]), ""), SamplingParams(SAMPLES, LIMIT, seed=i)
        )
        for i, row in enumerate(rows)
    ]
    texts = [
        (tokenizer.decode(c.token_ids, skip_special_tokens=True), row["digits"])
        for row, group in zip(rows, generate(engine, requests), strict=True)
        for c in group
    ]
    chains = [[right for _, right in judged(text, digits)] for text, digits in texts]
    correct = outcome([t for t, _ in texts], [d for _, d in texts])
    lengths = {kind: [len(c) for c, o in zip(chains, correct, strict=True) if o == kind] for kind in (0, 1)}
    behind = [len(c) - c.index(False) - 1 for c in chains if False in c]
    found = {
        "accuracy": statistics.mean(correct),
        "steps": statistics.mean(map(len, chains)),
        "steps_of_wrong": statistics.mean(lengths[0]) if lengths[0] else float("nan"),
        "steps_of_right": statistics.mean(lengths[1]) if lengths[1] else float("nan"),
        "wrong_steps": statistics.mean(c.count(False) for c in chains),
        "behind_the_first_error": statistics.mean(behind) if behind else 0.0,
        "chains_with_an_error": sum(False in c for c in chains) / len(chains),
    }
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = taught(options.runs)
    rows: list[dict[str, Any]] = [{"arm": "taught", "seed": 0} | measure(model)]
    for seed in SEEDS:
        for name, functions in ARMS.items():
            made = settings(model, options.runs / "train.jsonl", STEPS, LR, 16)
            made |= {"algorithm": {"name": "reinforce_pp", "kl": {"coef": 0.0}}, "seed": seed}
            made |= {"reward": {"functions": functions}}
            run = options.runs / f"{name.replace(' ', '')}-{seed}"
            rows.append({"arm": name, "seed": seed} | measure(train(made, run)))
            sys.stdout.write(f"{rows[-1]}\n")
    means = {
        name: {
            key: [round(statistics.mean(v), 4), min(v), max(v)]
            for key in rows[0]
            if key not in ("arm", "seed")
            for v in [[row[key] for row in rows if row["arm"] == name]]
        }
        for name in ("taught", *ARMS)
    }
    command = "python -m benchmarks.step_rewards --runs FOLDER --out FILE.json"
    results = {"command": command, "machine": machine(), "means": means, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
