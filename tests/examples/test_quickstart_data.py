"""The dataset of the quickstart is what its script writes, and its two sides share no question."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rlhf.data.prompts import load_prompts
from rlhf.models.pretrained import load_tokenizer

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def pairs(name: str) -> list[frozenset[int]]:
    lines = (QUICKSTART / name).read_text().splitlines()
    questions = [line.split("What is ")[1].split("?")[0] for line in lines]
    return [frozenset(map(int, question.split(" + "))) for question in questions]


def test_the_script_writes_the_committed_files(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_data", QUICKSTART / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_text() == (QUICKSTART / name).read_text(), name


def test_no_pair_stands_on_both_sides_in_either_order() -> None:
    train, held_out = pairs("train.jsonl"), pairs("eval.jsonl")
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == 100
    assert len(set(held_out)) == 18  # a third of the 55 unordered pairs


def test_both_sides_are_prompts_with_an_answer(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    for name, count in (("train.jsonl", 67), ("eval.jsonl", 33)):
        found = load_prompts(QUICKSTART / name, tokenizer, max_prompt_tokens=512)
        assert (found.columns, len(found)) == (("answer",), count)
