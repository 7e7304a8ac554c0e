"""The benchmark of two roles: the pairs of good and of bad writers."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.two_roles import BAD, GOOD, of_writers, pair, write_writers


def test_each_writer_has_half_of_the_completions_of_a_prompt(tmp_path: Path):
    rewards = {"a": [1.0, 0.0, 0.7, 0.3, 0.5, 0.9], "b": [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]}
    rows = [
        {"prompt": prompt, "words": [], "completion": f"{prompt}{reward}", "reward": reward}
        for prompt, several in rewards.items()
        for reward in several
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # of b both halves are tied, which makes no pair
    assert write_writers(tmp_path) == (1, 1)
    (good,), (bad,) = ((tmp_path / f).read_text().splitlines() for f in (GOOD, BAD))
    assert [json.loads(good)[key] for key in ("chosen", "rejected")] == ["a1.0", "a0.7"]
    assert [json.loads(bad)[key] for key in ("chosen", "rejected")] == ["a0.5", "a0.0"]
    assert pair(rows[6:9]) is None


def test_the_spread_is_the_difference_between_the_writers_of_a_seed():
    rows = [
        {"arm": arm, "seed": seed, "pairs": kind, "reward": reward, "held_out_margin": 10 * reward}
        for arm, rewards in {"srpo": (0.6, 0.5, 0.7, 0.8), "ipo": (0.9, 0.5, 0.8, 0.6)}.items()
        for (seed, kind), reward in zip(
            [(s, k) for s in (0, 1) for k in ("pairs_good", "pairs_bad")], rewards, strict=True
        )
    ]
    found = of_writers(rows)
    assert found["srpo, reward"]["spread"] == [0.1, 0.1, 0.1]
    assert found["ipo, reward"]["spread"] == [0.3, 0.2, 0.4]
    assert found["ipo, held_out_margin"]["spread_by_seed"] == [4.0, 2.0]
