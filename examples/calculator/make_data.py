"""Writes questions for the calculator (train, eval) and conversations that show how it is used (shown).

    python examples/calculator/make_data.py

The numbers have three digits, so that a small model cannot do without the tool. Half of the conversations in
`shown.jsonl` answer without it, and wrongly: a model that learns from them uses the tool now and then, and
reinforcement learning finds out that it should.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.environments.conversation import tools_as_text
from rlhf.environments.tools import schema_of
from rlhf.plugins import load_object

HERE = Path(__file__).parent
CALCULATOR: Any = load_object(f"{HERE / 'environment.py'}:Calculator")
SEED = 0
WORDS = {"add": "plus", "subtract": "minus", "multiply": "times"}


def main(folder: Path = HERE) -> None:
    rng = random.Random(SEED)
    seen: set[str] = set()
    rows = list(questions(rng, seen))
    write(folder / "train.jsonl", rows[:400])
    write(folder / "eval.jsonl", rows[400:464])
    write(folder / "shown.jsonl", [shown(rng, row) for row in rows[464:]])


def questions(rng: random.Random, seen: set[str], count: int = 528) -> Iterator[dict[str, Any]]:
    """Different questions, each with its answer."""
    while len(seen) < count:
        tool, a, b = rng.choice(list(WORDS)), rng.randint(100, 999), rng.randint(100, 999)
        text = f"What is {a} {WORDS[tool]} {b}?"
        if text in seen:
            continue
        seen.add(text)
        answer = {"add": a + b, "subtract": a - b, "multiply": a * b}[tool]
        yield {"prompt": [{"role": "user", "content": text}], "answer": str(answer), "call": [tool, a, b]}


def shown(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """A conversation: with the tool, or without it and wrong."""
    tool, a, b = row["call"]
    if rng.random() < 0.5:
        turns = [{"role": "assistant", "content": str(rng.randint(100, 999_999))}]
    else:
        call = json.dumps({"name": tool, "arguments": {"a": a, "b": b}})
        turns = [
            {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
            {"role": "tool", "content": row["answer"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    return {"messages": [{"role": "system", "content": told()}, *row["prompt"], *turns]}


def told() -> str:
    """What a run with this environment puts before the questions, for a model whose template has no tools."""
    methods = [getattr(CALCULATOR, name) for name in ("add", "subtract", "multiply", "divide")]
    return tools_as_text([schema_of(method, method.__name__) for method in methods])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "call"}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
