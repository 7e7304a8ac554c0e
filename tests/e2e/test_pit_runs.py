"""PIT's whole road on tiny models: a reward of gaps, a policy that improves answers by it, revisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.cli import main
from rlhf.config.reward_model import RewardModelConfig
from rlhf.models.pretrained import load_tokenizer
from rlhf.reward_model.trainer import RewardModelTrainer
from tests.support import bandit_settings, metrics_of, reward_model_settings

IMPROVE = " more:"


def write_pairs(folder: Path) -> Path:
    """The better answer has more of the letter a."""
    file = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"say {i}:", "chosen": "a" * (2 + i % 3), "rejected": "b" * (1 + i % 4)} for i in range(16)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_policy_learns_to_improve_answers_by_the_gap(tmp_path: Path, tiny_model_dir: Path) -> None:
    file = write_pairs(tmp_path)
    both = {"train": str(file), "eval": str(file)}
    score = reward_model_settings(tmp_path, tiny_model_dir, steps=16, score={"kind": "gap"}, data=both)
    score["run_dir"] = str(tmp_path / "gap")
    RewardModelTrainer(RewardModelConfig.model_validate(score)).run()
    model = str(tmp_path / "gap" / "model")
    function = {"path": "reward_model", "params": {"model": model}, "batch": "step", "memory_gib": 16.0}
    data = {"improve_column": "rejected", "improve_prompt": IMPROVE}
    settings = bandit_settings(
        tmp_path, tiny_model_dir, steps=8, data=data, reward={"functions": [{**function, "timeout": 60.0}]}
    )
    settings["data"] |= both
    settings["checkpoint"], settings["eval"] = {"export": True, "every": 0}, {"samples": 2, "max_prompts": 4}
    (tmp_path / "pit.json").write_text(json.dumps(settings))
    assert main(["train", str(tmp_path / "pit.json")]) == 0
    rewards = [step["reward/mean"] for step in metrics_of(tmp_path)]
    assert sum(rewards[4:]) > sum(rewards[:4]) + 0.5
    assert_rewards_are_gaps(tmp_path / "run" / "samples.jsonl", model)

    out = tmp_path / "revised.json"
    command = ["eval", str(tmp_path / "run"), "--revise", "2", "--out", str(out)]
    assert main([*command, "--revise-while", "reward_model"]) == 0
    first, second = json.loads(out.read_text())["revisions"]
    assert first["objectives"].keys() == {"reward_model"} and len(second["texts"]) == 4
    assert main([*command[:3], "0", "--revise-while", "x"]) != 0


def assert_rewards_are_gaps(file: Path, model: str) -> None:
    """Rewards are the logits of the classifier itself for the tokens: x y <end> y_ref <end>."""
    tokenizer: Any = load_tokenizer(model)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()
    compared = 0
    references = {f"say {i}:": "b" * (1 + i % 4) for i in range(16)}
    for line in file.read_text().splitlines()[:4]:
        group = json.loads(line)
        for completion in group["completions"]:
            ids: list[int] = tokenizer(group["prompt"], add_special_tokens=False)["input_ids"]
            for text in (completion["text"], references[group["prompt"]]):
                ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                gap = classifier(torch.tensor([ids])).logits.item()
            assert completion["reward"] == pytest.approx(gap, abs=1e-4)
            compared += 1
    assert compared > 4
