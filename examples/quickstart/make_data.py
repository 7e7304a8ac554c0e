"""Writes train.jsonl and eval.jsonl: additions of two one-digit numbers, as chat messages.

    python examples/quickstart/make_data.py

A quarter of the unordered pairs is held out, so 3 + 5 and 5 + 3 are always in the same file: the evaluation
asks only what training never showed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import combinations_with_replacement
from pathlib import Path

HELD_OUT_SHARE = 0.33
SEED = 0


def additions(pairs: list[tuple[int, int]]) -> Iterator[dict[str, object]]:
    for a, b in pairs:
        for first, second in sorted({(a, b), (b, a)}):
            question = f"What is {first} + {second}? Reply with the number only."
            yield {"prompt": [{"role": "user", "content": question}], "answer": first + second}


def main(folder: Path) -> None:
    pairs = list(combinations_with_replacement(range(10), 2))
    held_out = set(random.Random(SEED).sample(pairs, round(HELD_OUT_SHARE * len(pairs))))
    for name, chosen in (
        ("train.jsonl", [pair for pair in pairs if pair not in held_out]),
        ("eval.jsonl", [pair for pair in pairs if pair in held_out]),
    ):
        lines = [json.dumps(row) + "\n" for row in additions(chosen)]
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
