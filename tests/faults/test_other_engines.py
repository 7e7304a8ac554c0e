"""With an engine that ignores seeds, a resumed run still requests the same prompts and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.processes import STEPS, Fault, launch, settings_of

ENGINE = """
import json, os, pathlib
from dataclasses import replace
from rlhf.rollout.native.engine import NativeEngine

ASKED = pathlib.Path(__file__).with_name("asked.jsonl")

class Unseeded(NativeEngine):
    def submit(self, requests):
        with ASKED.open("a") as file:
            file.write(json.dumps([[r.prompt.id, r.params.n] for r in requests]) + "\\n")
        own = [int.from_bytes(os.urandom(6), "little") for _ in requests]
        super().submit([replace(r, params=replace(r.params, seed=s)) for r, s in zip(requests, own)])
"""
COIN = """
def coin(completions, prompts, **_):
    # random rewards for odd prompts, 0 for even ones, so that their success rates differ
    odd = [int("".join(filter(str.isdigit, str(prompt)))) % 2 for prompt in prompts]
    return [float(is_odd and sum(map(ord, text)) % 2) for is_odd, text in zip(odd, completions)]
"""


def asked(folder: Path) -> list[list[tuple[str, int]]]:
    """The prompts and budgets of each rollout, without evaluations and the probes of the weight sync."""
    found = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    return [[(name, n) for name, n in one] for one in found if len(one) == 4]


def test_prompts_and_budgets_of_a_step_that_was_killed_are_asked_for_again(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "engine.py").write_text(ENGINE)
    (tmp_path / "coin.py").write_text(COIN)
    changes: dict[str, Any] = {
        "rollout": {"engine": f"{tmp_path}/engine.py:Unseeded", "group_size": 8},
        # rates are known from the first visit on, and every prompt is visited again within the run
        "budget": {"rule": "knapsack", "prior": 1.0, "high": 16},
        "reward": {"functions": [{"path": f"{tmp_path}/coin.py:coin"}]},
        "checkpoint": {"every": 1},
        "data": {"eval": None},
        "eval": {"every": 0},
    }
    settings = settings_of(tmp_path, tiny_model_dir, **changes)
    prompts = "".join(f'{{"prompt": "say {i}:"}}\n' for i in range(8))
    (tmp_path / "train.jsonl").write_text(prompts)
    fault = Fault("rlhf.rewards.scoring:Rewards.gather", 3)
    assert launch(settings, tmp_path / "log", fault=fault)[0].code == -9
    before = asked(tmp_path)
    (resumed,) = launch(settings, tmp_path / "again")
    assert resumed.code == 0, resumed.said
    after = asked(tmp_path)[len(before) :]
    assert len(before) == 4 and len(after) == STEPS - 3
    assert after[0] == before[-1]
    assert len({n for _, n in before[-1]}) > 1, "budgets are those of what was seen before"
