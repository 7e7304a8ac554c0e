"""A scorer that learns to put the best completion in front, by nDCG or by a utility of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.reward_model import RewardModelConfig
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.rewards.model import RewardModel
from tests.support import metrics_of, reward_model_settings


def rows(count: int) -> list[dict[str, Any]]:
    """Lists of completions of which that with the most of the letter a is the relevant one."""
    texts = [["b", "a" * (2 + i % 3), "ab", "c" * (1 + i % 4)] for i in range(count)]
    return [{"prompt": f"say {i}:", "completions": c, "relevance": [0, 1, 0, 0]} for i, c in enumerate(texts)]


def settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    made = {"score": {"kind": "ranking", "ranking": {"samples": 8}}, "learner": {"lr": 3e-2}}
    return reward_model_settings(folder, model_dir, **{**made, **changes})


def make(settings: dict[str, Any]) -> RewardModelConfig:
    return RewardModelConfig.model_validate(settings)


def test_it_puts_the_relevant_one_in_front_and_serves_as_a_reward(tmp_path: Path, tiny_model_dir: Path):
    trainer = RewardModelTrainer(make(settings(tmp_path, tiny_model_dir)))
    trainer.run()
    details = json.loads((tmp_path / "run" / "calibration.json").read_text())
    # all scores are 0 at first: each of four is in front as often
    assert details[0]["objectives"]["score"]["ndcg@1"] == 0.25
    assert details[-1]["objectives"]["score"]["ndcg@1"] > 0.9
    steps = metrics_of(tmp_path)
    assert steps[-1]["reward_model/utility"] > steps[0]["reward_model/utility"]
    ours = trainer.learner.scores(trainer.held_out)[:, 0].tolist()
    served = RewardModel(str(tmp_path / "run" / "model"))
    prompts = [e.prompt.content for e in trainer.held_out for _ in e.texts]
    assert served(prompts, [t for e in trainer.held_out for t in e.texts]) == pytest.approx(ours, abs=1e-4)
    # of an episode the last message is scored, behind all that was said before it
    roles = ["user", "assistant", "tool", "assistant"]
    told = [
        {"role": role, "content": text} for role, text in zip(roles, ["why", "see", "so", "ah"], strict=True)
    ]
    whole, split, alone = served([told[:1], told[:3], told[:1]], [told[1:], told[3:], told[3:]])
    assert whole == split != alone


def test_a_utility_of_ones_own_is_what_is_learned(tmp_path: Path, tiny_model_dir: Path):
    # the relevant one is to be last, which is 1 - nDCG in spirit
    (tmp_path / "mine.py").write_text("def last(relevance):\n    return relevance[-1]\n")
    score = {"kind": "ranking", "ranking": {"samples": 8, "utility": f"{tmp_path}/mine.py:last"}}
    RewardModelTrainer(
        make(settings(tmp_path, tiny_model_dir, score=score, checkpoint={"export": False}))
    ).run()
    found = json.loads((tmp_path / "run" / "calibration.json").read_text())[-1]["objectives"]["score"]
    assert found["utility"] > 0.9 and found["accuracy"] < 0.1 and "ndcg@1" not in found


def test_what_a_utility_returns_must_be_a_number(tmp_path: Path, tiny_model_dir: Path):
    (tmp_path / "mine.py").write_text("def nothing(relevance):\n    return None\n")
    score = {"kind": "ranking", "ranking": {"utility": f"{tmp_path}/mine.py:nothing"}}
    with pytest.raises(ValueError, match=r"mine\.py:nothing: what it returns must be a number, got None"):
        RewardModelTrainer(make(settings(tmp_path, tiny_model_dir, score=score))).run()


@pytest.mark.parametrize(
    ("completions", "relevance", "message"),
    [
        (["x"], [1], "completions must be a list of two or more"),
        (["x", "y"], [1], "relevance must be a list of 2 numbers"),
        (["x", "y"], [1, None], "each relevance must be a number, got None"),
        (["x", "y"], [1, 1], "all completions have the relevance 1, so none comes first"),
        (["x", "y"], [1, -1], "nDCG needs relevances of 0 or more, got -1"),
        (["x", ""], [1, 0], "column 'completions' must be non-empty text"),
    ],
)
def test_a_bad_line_is_refused(
    tmp_path: Path, tiny_model_dir: Path, completions: list[str], relevance: list[Any], message: str
):
    made = settings(tmp_path, tiny_model_dir)
    row = {"prompt": "p", "completions": completions, "relevance": relevance}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"train.jsonl:1: {message}"):
        RewardModelTrainer(make(made))
