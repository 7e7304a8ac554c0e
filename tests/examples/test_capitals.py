"""The example of docs/ppo_max.md: its data is what its script makes, and its rule prefers what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.plugins import load_object

FOLDER = Path(__file__).parents[2] / "examples" / "capitals"
MAKE: Any = load_object(f"{FOLDER / 'make_data.py'}:main")
RULE: Any = load_object(f"{FOLDER / 'rule.py'}:rule")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_the_files_are_what_the_script_makes(tmp_path: Path):
    MAKE(tmp_path)
    made = sorted(tmp_path.iterdir())
    assert [file.name for file in made] == [
        "asked_eval.jsonl",
        "asked_train.jsonl",
        "eval.jsonl",
        "pairs_eval.jsonl",
        "pairs_train.jsonl",
        "ratings.jsonl",
        "train.jsonl",
    ]
    for file in made:
        assert file.read_bytes() == (FOLDER / file.name).read_bytes(), file.name


def test_no_country_is_both_trained_on_and_held_out():
    def countries(*names: str) -> set[str]:
        return {row["prompt"][-1]["content"] for name in names for row in rows(name)}

    train = countries("train", "pairs_train", "asked_train", "ratings")
    assert not train & countries("eval", "pairs_eval", "asked_eval")
    assert len(countries("train", "eval")) == 36


def test_the_chosen_answer_has_the_higher_true_score():
    for pair in rows("pairs_train") + rows("pairs_eval"):
        better, worse = RULE([pair["chosen"], pair["rejected"]], [pair["answer"]] * 2)
        assert better["truth"] > worse["truth"], pair


def test_the_rule_knows_correct_short_and_polite():
    texts = [
        "Of course! The capital of France is Paris.",
        "Paris.",
        "It is Rome, not Paris.",
        "The capital of France is Paris, which is known for its art and its",
        [{"role": "assistant", "content": "Happy to help! It is Rome."}],
    ]
    scores = RULE(texts, ["Paris"] * 5)
    assert [[s["correct"], s["short"], s["polite"]] for s in scores] == [
        [1.0, 1.0, 1.0],
        [1.0, 1.0, 0.0],
        [0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 1.0],
    ]
    assert [round(3 * s["truth"]) for s in scores] == [3, 2, 1, 1, 2]
