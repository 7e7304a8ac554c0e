"""`rlhf pairs order`: perplexities by a plain forward, and how lines are cut by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main
from rlhf.pairs.files import PairsError
from rlhf.pairs.order import Cuts, cut, hardest

CALLS = ("[f(1)]", "[add(a=1, b=2)]", "[g(22)]", "[h()]")
WORDS = ("no", "I do not know", "yes, it is")


def test_of_each_kind_the_same_share_is_hard() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0]
    kinds = [True, True, True, True, True, False, False, False]
    # .4 of five calls are two, and of three answers without one two (1.2 rounded up); easy to hard
    assert hardest(values, kinds, 0.4) == [2, 0, 6, 5]
    # .3 of ten are three, not four, whatever .3 x 10 is in floating point
    assert len(hardest([float(i) for i in range(10)], [True] * 10, 0.3)) == 3
    # of equal values the later place is the harder one
    assert hardest([1.0, 1.0, 1.0], [True] * 3, 0.3) == [2]
    assert hardest(values, kinds, 1.0) == [1, 3, 4, 2, 0, 7, 6, 5]


def test_parts_differ_by_at_most_one_line() -> None:
    assert [list(part) for part in cut(8, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [len(part) for part in cut(9, 3)] == [3, 3, 3]


@pytest.mark.parametrize(("parts", "share"), [(0, 0.3), (3, 0.0), (3, 1.1)])
def test_cuts_that_are_none_are_refused(parts: int, share: float) -> None:
    with pytest.raises(PairsError, match="--share must be above 0"):
        Cuts(parts, share)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("order")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": text},
            ],
            "number": n,
        }
        for n, text in enumerate((*CALLS, *WORDS))
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    settings: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": 1,
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"mode": "offline", "train": str(folder / "chats.jsonl"), "max_prompt_tokens": 64},
        "algorithm": "sft",
        "rollout": {"prompts_per_step": 2, "max_completion_tokens": 32},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_are_written_from_easy_to_hard(
    config: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = config.parent / "out"
    assert main(["pairs", "order", str(config), "--out", str(out), "--parts", "2"]) == 0
    parts = [read(out / f"part_{n}.jsonl") for n in (1, 2)]
    assert [len(part) for part in parts] == [4, 3]
    lines = [line for part in parts for line in part]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    words: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    expected: dict[int, float] = {}
    for line in lines:
        question, answer = (message["content"] for message in line["messages"])
        before = words(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        own = words(f"{answer}<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
        expected[line["number"]] = float((-logits.log_softmax(-1)[range(len(own)), own].mean()).exp())
    assert {line["number"]: line["perplexity"] for line in lines} == pytest.approx(expected, rel=1e-4)
    assert [line["number"] for line in lines] == sorted(expected, key=lambda n: expected[n])
    # .3 of four calls are two (1.2 rounded up), and of three others one
    hard = [line["number"] for line in read(out / "hard.jsonl")]
    calls = sorted(range(4), key=lambda n: expected[n])[2:]
    others = sorted(range(4, 7), key=lambda n: expected[n])[2:]
    assert hard == sorted([*calls, *others], key=lambda n: expected[n])
    assert "3 lines: 2 of 4 with a call, 1 of 3 without" in capsys.readouterr().out
    # what is there is not overwritten
    assert main(["pairs", "order", str(config), "--out", str(out)]) == 2
    assert "holds files already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "8"], "7 lines cannot be cut into 8 parts"),
        (["data.mode=online", "reward.functions=[a:b]"], "takes those of the data"),
    ],
)
def test_what_cannot_be_ordered_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["pairs", "order", str(config), "--out", str(config.parent / "none"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_lines_of_one_prompt_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = config.parent / "twice.jsonl"
    twice.write_text("".join(json.dumps({"prompt": "p", "completion": text}) + "\n" for text in "ab"))
    out = str(config.parent / "none")
    assert main(["pairs", "order", str(config), "--out", out, f"data.train={twice}"]) == 2
    assert "1 lines have the prompt of another line" in capsys.readouterr().err
