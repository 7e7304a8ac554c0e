"""A gated reward model: objectives fitted to ratings, a gate that learns from pairs, both served by name."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.reward_model import RewardModelConfig
from rlhf.reward_model.frozen_states import FrozenStates
from rlhf.reward_model.trainer import RewardModelTrainer, describe
from rlhf.rewards.model import RewardModel
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.types import Completion, FinishReason
from tests.support import metrics_of, reward_model_settings

OBJECTIVES = ["vowels", "length"]


def rated(count: int) -> list[dict[str, Any]]:
    """Completions with ratings for their vowels and their length; every third has no rating for the first."""
    texts = ["a" * (i % 5) + "b" * (i % 7) + "c" for i in range(count)]
    return [
        {
            "prompt": f"say {i % 3}:",
            "completion": text,
            "ratings": {"vowels": None if i % 3 == 0 else text.count("a"), "length": len(text)},
        }
        for i, text in enumerate(texts)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of which the one with more vowels is chosen, the shorter one of both."""
    return [
        {"prompt": f"say {i % 3}:", "chosen": "a" * (1 + i % 3) + "c", "rejected": "b" * (4 + i % 3) + "c"}
        for i in range(count)
    ]


def settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    for name, rows in (("train", pairs(12)), ("eval", pairs(6)), ("rated", rated(30))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {
        "score": {"kind": "gated", "objectives": OBJECTIVES, "gate": {"width": 8, "layers": 1}},
        "data": {"ratings": str(folder / "rated.jsonl")},
        "steps": 4,
    }
    return reward_model_settings(folder, model_dir, **{**made, **changes})


def trained(folder: Path, model_dir: Path, **changes: Any) -> RewardModelTrainer:
    trainer = RewardModelTrainer(RewardModelConfig.model_validate(settings(folder, model_dir, **changes)))
    trainer.run()
    return trainer


def test_it_learns_which_objective_counts_and_serves_the_same_scores(tmp_path: Path, tiny_model_dir: Path):
    trainer = trained(tmp_path, tiny_model_dir)
    details = json.loads((tmp_path / "run" / "calibration.json").read_text())
    names = ["score", "mean of the objectives", *OBJECTIVES]
    assert list(details[0]["objectives"]) == names
    # length is on the side of the rejected ones
    assert details[-1]["objectives"]["length"]["accuracy"] == 0.0
    steps = metrics_of(tmp_path)
    assert steps[0]["reward_model/gate/vowels"] == pytest.approx(0.5, abs=0.05)
    assert steps[-1]["reward_model/gate/vowels"] > steps[0]["reward_model/gate/vowels"]
    assert steps[-1]["reward_model/loss"] < steps[0]["reward_model/loss"]

    ours = trainer.learner.scores(trainer.held_out)
    served = RewardModel(str(tmp_path / "run" / "model"))
    logged: dict[str, Any] = {}
    prompts = [e.prompt.content for e in trainer.held_out for _ in range(2)]
    texts = [text for e in trainer.held_out for text in e.texts]
    found: Any = served(prompts, texts, log_extra=logged.__setitem__, log_metric=logged.__setitem__)
    assert [sum(scores.values()) for scores in found] == pytest.approx(ours[:, 0].tolist(), abs=1e-4)
    for scores, gate, own in zip(found, logged["gate"], ours[:, 2:].tolist(), strict=True):
        expected = [gate[name] * r for name, r in zip(OBJECTIVES, own, strict=True)]
        assert [scores[name] for name in OBJECTIVES] == pytest.approx(expected, abs=2e-3)
    mean = sum(gate["vowels"] for gate in logged["gate"]) / len(texts)
    assert logged["gate_vowels"] == pytest.approx(mean, abs=1e-4)


def test_the_frozen_model_is_read_once_for_each_example(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    computed = FrozenStates._computed  # pyright: ignore[reportPrivateUsage]

    def counted(self: FrozenStates, examples: Any) -> Any:
        seen.extend(map(id, examples))
        return computed(self, examples)

    monkeypatch.setattr(FrozenStates, "_computed", counted)
    trainer = trained(tmp_path, tiny_model_dir, steps=6, eval={"every": 1}, checkpoint={"export": False})
    assert sorted(seen) == sorted(map(id, [*trainer.train, *trainer.held_out, *trainer.first]))


def test_verbosity_is_taken_out_and_has_no_score_of_its_own(tmp_path: Path, tiny_model_dir: Path):
    score = {"kind": "gated", "objectives": OBJECTIVES, "verbosity": "length", "gate": {"width": 4}}
    trainer = trained(tmp_path, tiny_model_dir, score=score, steps=1, checkpoint={"export": False})
    assert "less 1 of length" in list(trainer.learner.told())[1]
    assert trainer.learner.scores(trainer.held_out)[:, 3].abs().max() == 0.0


def test_a_run_that_was_cut_short_goes_on_with_the_same_gate(tmp_path: Path, tiny_model_dir: Path):
    made = settings(tmp_path, tiny_model_dir, checkpoint={"every": 2})
    RewardModelTrainer(RewardModelConfig.model_validate(made)).run()
    weights = load_file(tmp_path / "run" / "model" / "gate.safetensors")
    for path in (tmp_path / "run" / "checkpoints").glob("*4"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    made["checkpoint"]["resume"] = "auto"
    RewardModelTrainer(RewardModelConfig.model_validate(made)).run()
    again = load_file(tmp_path / "run" / "model" / "gate.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_run_logs_the_gate_beside_each_completion(tmp_path: Path, tiny_model_dir: Path):
    trainer = trained(tmp_path, tiny_model_dir, steps=1)
    folder = tmp_path / "run" / "model"
    spec = RewardSpec("reward_model", params={"model": str(folder)}, batch="step", timeout=60.0)
    example = trainer.held_out[0]
    samples = [
        Completion(example.prompt.id, i, c, (-1.0,) * len(c), FinishReason.STOP, ())
        for i, c in enumerate(example.completions)
    ]
    with closing(Rewards([spec], ())) as rewards:
        [group], metrics = rewards.score([example.prompt], [samples], [example.texts], trainer_state={})
    for trajectory in group.trajectories:
        assert trajectory.reward == pytest.approx(sum(trajectory.objectives.values()))
        assert set(json.loads(trajectory.logged["reward_model/gate"])) == set(OBJECTIVES)
    assert metrics["reward/reward_model/gate_vowels"].value == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match=r"lacks the file gate\.safetensors"):
        (folder / "gate.safetensors").unlink()
        RewardModel(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"ratings": None}}, "data.ratings has the rated completions .* give it"),
        (
            {"score": {"kind": "gated", "objectives": OBJECTIVES, "verbosity": "x"}},
            "score.verbosity is 'x', which is not one of",
        ),
        ({"score": {"kind": "gated"}}, "must name two or more, .*; got score"),
        ({"score": {"kind": "pairs"}}, "the kind is pairs, leave it out"),
        (
            {"score": {"kind": "gated", "objectives": OBJECTIVES, "lm_coef": 1.0}},
            "score.lm_coef weighs a loss .* must be 0, got 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig.model_validate(settings(tmp_path, tiny_model_dir, **changes))


def test_a_gate_has_its_own_learning_rate_and_too_few_ratings_are_refused(
    tmp_path: Path, tiny_model_dir: Path
):
    made = settings(tmp_path, tiny_model_dir)
    del made["learner"]["lr"]
    config = RewardModelConfig.model_validate(made)
    assert config.learner.lr == 1e-3
    assert "fitted to    30 rated completions" in "\n".join(describe(RewardModelTrainer(config)))
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated(4)))
    with pytest.raises(ValueError, match=r"rated.jsonl: .* has 2 ratings.*0: vowels"):
        RewardModelTrainer(config).run()
