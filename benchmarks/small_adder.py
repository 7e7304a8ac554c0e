"""Makes a small model that can partly add, and problems from easy to hard, for comparisons with many seeds.

FOLDER/model is a Llama of about 0.7 million weights, one token for each character, taught sums of one to
three digits by supervised steps that stop early, so that some problems are nearly always solved and others
nearly never. FOLDER/train.jsonl and FOLDER/eval.jsonl hold problems of all kinds; none is in both, nor in
the lessons. FOLDER/config.yaml trains it on them.

Run: `python -m benchmarks.small_adder FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.characters import tokenizer

LESSONS, BATCH, LR = 1000, 128, 2e-3
TRAIN, HELD_OUT = 240, 120
CHARACTERS = "0123456789+="


DIGITS = ((2, 1), (2, 2), (3, 3))


def problems(count: int, seed: int) -> list[tuple[int, int]]:
    """Distinct pairs of numbers, a third each with the digits of `DIGITS`."""
    rng = random.Random(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        first, second = (rng.randrange(10 ** (d - 1), 10**d) for d in DIGITS[len(pairs) % 3])
        pairs[first, second] = None
    return list(pairs)


def teach(words: PreTrainedTokenizerFast, withheld: set[tuple[int, int]], lessons: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for lesson in range(lessons):
        pairs = [pair for pair in problems(BATCH, lesson + 1000) if pair not in withheld]
        texts = [f"{a}+{b}={a + b}<end>" for a, b in pairs]
        batch = words(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        # the loss is over the sum only
        equals = words.convert_tokens_to_ids("=")
        labels[(batch.input_ids == equals).cumsum(-1) == 0] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if lesson % 100 == 99:
            print(f"lesson {lesson + 1}: loss {loss.item():.3f}", flush=True)  # noqa: T201
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": "runs/adder",
        "steps": 120,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_prompt_tokens": 16,
        },
        "reward": {"functions": [{"path": "rlhf.rewards.builtin:numeric_match"}]},
        "algorithm": {"name": "dapo", "refill": 0, "overlong_cache": 0},
        "rollout": {"prompts_per_step": 24, "group_size": 8, "max_completion_tokens": 6},
        "budget": {"rule": "knapsack", "low": 2, "high": 48},
        "eval": {"every": 20, "samples": 4},
        "learner": {"lr": 1e-4, "microbatch_tokens": 4096},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a small model and sums of three kinds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lessons", type=int, default=LESSONS)
    parser.add_argument("--out", type=Path, help="write what was made as JSON")
    options = parser.parse_args()
    folder = options.folder
    pairs = problems(TRAIN + HELD_OUT, seed=0)
    words = tokenizer(CHARACTERS)
    model = teach(words, set(pairs), options.lessons)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(folder), sort_keys=False))
    for name, part in (("train", pairs[:TRAIN]), ("eval", pairs[TRAIN:])):
        lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    if options.out:
        options.out.write_text(json.dumps({"lessons": options.lessons}) + "\n")


if __name__ == "__main__":
    main()
