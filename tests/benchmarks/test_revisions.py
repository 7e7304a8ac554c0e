"""The benchmark of revisions: its lessons show second answers as a reviser asks for them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.revisions import ASK, write_lessons


def test_every_completion_is_a_first_answer_and_a_second_one_behind_another(tmp_path: Path):
    rows = [{"prompt": "use a :", "completion": c, "reward": 0.5, "words": ["a"]} for c in ("a .", "b .")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_lessons(tmp_path, seed=0)
    lessons = [json.loads(line) for line in (tmp_path / "lessons.jsonl").read_text().splitlines()]
    assert sorted(row["completion"] for row in lessons) == ["a .", "a .", "b .", "b ."]
    seconds = [row["prompt"] for row in lessons if row["prompt"] != "use a :"]
    assert len(seconds) == 2 and set(seconds) <= {f"use a : {first}{ASK}" for first in ("a .", "b .")}
