"""Writes train.jsonl and eval.jsonl: reasoning-gym tasks from easy to nearly out of reach for a 135M model.

    pip install reasoning-gym==0.1.25      # the `gym` extra
    python examples/knapsack/make_data.py

No question is in both files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum of two digits": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "product of two digits": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "sum of three digits": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "greatest common divisor": ("gcd", {"max_value": 30}),
    "sum of two-digit numbers": (
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    ),
}
TRAIN, EVAL = 16, 8
SEED = 0


def questions(task: str) -> Iterator[dict[str, Any]]:
    """Every question of a task once, in the order in which reasoning-gym generates them."""
    name, settings = TASKS[task]
    seen: set[str] = set()
    for entry in reasoning_gym.create_dataset(name, size=1000, seed=SEED, **settings):
        text = entry["question"]
        if text not in seen:
            seen.add(text)
            ask = text if "only" in text else f"{text}\nReply with the number only."
            yield {"prompt": [{"role": "user", "content": ask}], "answer": int(entry["answer"]), "task": task}


def main(folder: Path) -> None:
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for task in TASKS:
        rows = questions(task)
        train += [next(rows) for _ in range(TRAIN)]
        held_out += [next(rows) for _ in range(EVAL)]
    for name, rows in (("train.jsonl", train), ("eval.jsonl", held_out)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
