"""What users bring from elsewhere (functions of TRL, verl and others): a config under 15 lines runs it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf.config.load import load_config
from rlhf.trainer import Trainer

TRL = '''
import re

# Reward functions with TRL's signature: chat completions, a column of the dataset, the rest as keywords.


def format_reward(completions, **kwargs):
    """1 for a completion that ends with a full stop."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.search(r"\\.$", content) else 0.0 for content in contents]


def accuracy_reward(prompts, completions, ground_truth, trainer_state, **kwargs):
    assert len(kwargs["completion_ids"]) == len(prompts) == len(completions)
    assert prompts[0][-1]["role"] == "user"
    assert trainer_state.global_step in (0, 1)
    contents = [completion[0]["content"] for completion in completions]
    return [None if truth == "skip" else float(truth in content)
            for content, truth in zip(contents, ground_truth)]
'''

NEIGHBOUR = """
def score(text):
    print("scored", len(text))
    return len(text) / 9
"""
PRINTS = """
from beside_trl import score


def accuracy_reward(completions, **_):
    return [score(c[-1]["content"]) for c in completions]


def format_reward(completions, **_):
    print("nothing said\\nof", len(completions))
    return [0.0] * len(completions)
"""

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "tiny" and extra_info["index"] >= 0
    return {"score": float(ground_truth in solution_str), "acc": 1.0}
"""

# settings of every run: a tiny model and two small steps
SMALL = [
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "rollout.max_completion_tokens=6",
    "learner.microbatch_tokens=4096",
    "checkpoint.export=false",
    "monitor.sinks=[]",
    "model.dtype=float32",
]

CONFIGS = {
    "trl": """
run_dir: run
steps: 2
model: {path: MODEL}
data: {train: chat.jsonl, max_prompt_tokens: 64}
reward:
  functions:
    - {path: "trl.py:accuracy_reward"}
    - {path: "trl.py:format_reward", weight: 0.5}
algorithm: {name: grpo}
""",
    "verl": """
run_dir: run
steps: 2
model: {path: MODEL}
data: {train: verl.jsonl, max_prompt_tokens: 64}
reward:
  functions:
    - {path: "verl.py:compute_score"}
algorithm: {name: dapo, refill: 0}
""",
    "gym": """
run_dir: run
steps: 2
model: {path: MODEL}
data: {train: "gym:chain_sum?size=8&max_terms=2&max_digits=1", max_prompt_tokens: 128}
algorithm: {name: grpo}
""",
}
OBJECTIVES = {"trl": {"accuracy_reward", "format_reward"}, "verl": {"compute_score"}, "gym": {"gym"}}


def write_data(folder: Path) -> None:
    chat = [
        {"prompt": [{"role": "user", "content": f"{i} + 1?"}], "ground_truth": str(i % 5)} for i in range(8)
    ]
    verl = [
        {
            "prompt": chat[i]["prompt"],
            "data_source": "tiny",
            "reward_model": {"style": "rule", "ground_truth": str(i % 5)},
            "extra_info": {"index": i},
        }
        for i in range(8)
    ]
    for name, rows in (("chat", chat), ("verl", verl)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "trl.py").write_text(TRL)
    (folder / "verl.py").write_text(VERL)


def test_a_file_imports_its_neighbours_and_what_it_prints_can_be_read(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("beside_trl.py").write_text(NEIGHBOUR)
    Path("trl.py").write_text(PRINTS)
    Path("mine.yaml").write_text(CONFIGS["trl"].replace("MODEL", str(tiny_model_dir)))
    Trainer(load_config("mine.yaml", SMALL)).run()
    lines = Counter(Path("run/rewards.log").read_text().splitlines())
    # two steps of 16 samples; lines are whole though several workers print at once, and the last lines are
    # there
    scored = re.compile(r"accuracy_reward: scored \d+")
    assert sum(count for line, count in lines.items() if scored.fullmatch(line)) == 32
    assert lines["format_reward: nothing said"] == lines["format_reward: of 1"] == 32
    assert lines.total() == 96
    assert "Traceback" not in capfd.readouterr().err, "of a keeper whose words nobody read"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_of_under_15_lines_runs_it(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    assert len(CONFIGS[kind].strip().splitlines()) < 15
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIGS[kind].replace("MODEL", str(tiny_model_dir)))
    Trainer(load_config("mine.yaml", SMALL)).run()
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        for objective in OBJECTIVES[kind]:
            assert 0 <= record[f"reward/{objective}"] <= 1
            assert record[f"reward/std/{objective}"] >= 0
            assert record[f"reward/failed/{objective}"] == 0
            assert 0 <= record[f"time/reward_p50/{objective}"] <= record[f"time/reward_p99/{objective}"]
