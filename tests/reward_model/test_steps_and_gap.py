"""Process reward models, which score steps, and models of the quality gap, which read two completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.reward_model import RewardModelConfig
from rlhf.models.scored_text import AtSteps
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.rewards.judges.models import PairRewards
from rlhf.rewards.model import RewardModel
from rlhf.rewards.plugin import RewardSpec
from tests.support import reward_model_settings


def stepped(count: int) -> list[dict[str, Any]]:
    """Steps that are good if they begin with a, the last one of every third completion bad."""
    return [
        {
            "prompt": f"say {i}:",
            "steps": ["a" * (1 + i % 3), "b" * (1 + i % 2), "b" if i % 3 == 0 else "aa"],
            "labels": [1, False, 0 if i % 3 == 0 else True],
        }
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"say {i}:", "chosen": "a" * (1 + i % 4), "rejected": "b" * (1 + i % 5)}
        for i in range(count)
    ]


def trained(folder: Path, model_dir: Path, rows: list[dict[str, Any]], **changes: Any) -> RewardModelTrainer:
    trainer = made(folder, model_dir, rows, **changes)
    trainer.run()
    return trainer


def made(folder: Path, model_dir: Path, rows: list[dict[str, Any]], **changes: Any) -> RewardModelTrainer:
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = reward_model_settings(folder, model_dir, steps=16, **changes)
    return RewardModelTrainer(RewardModelConfig.model_validate(settings))


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "calibration.json").read_text())[-1]["objectives"]["score"]


def test_where_steps_end_is_where_they_are_cut():
    # parts of white space are no steps: they belong to the step behind them
    assert AtSteps("\n").ends("ab\n\nc\n") == [3, 6]
    assert AtSteps("##").ends("ab##c") == [4, 5]
    assert AtSteps("\n").ends(" \n") == [2] and AtSteps("\n").ends("") == [0]


def test_each_step_has_a_score_and_the_worst_is_the_reward(tmp_path: Path, tiny_model_dir: Path):
    trainer = trained(tmp_path, tiny_model_dir, stepped(9), score={"kind": "steps"})
    assert found(tmp_path)["steps told right"] > 0.9
    ours = trainer.learner.scores(trainer.held_out)[:, 0]
    assert len(ours) == 27
    folder = str(tmp_path / "run" / "model")
    prompts = [e.prompt.content for e in trainer.held_out]
    # cut into steps again, and once as a chat message
    texts: list[Any] = [e.texts[0] for e in trainer.held_out]
    texts[1] = [{"role": "assistant", "content": texts[1]}]
    by_step = ours.view(9, 3)
    for of_steps, expected in (
        ("min", by_step.amin(-1)),
        ("mean", by_step.mean(-1)),
        ("last", by_step[:, -1]),
    ):
        served = RewardModel(folder, of_steps=of_steps)  # pyright: ignore[reportArgumentType]
        assert served(prompts, texts) == pytest.approx(expected.tolist(), abs=1e-4)
    # or each step's score, where the step ends: behind its line end, the last one at the end of the text
    each = RewardModel(folder, of_steps="each")
    assert each.gives_steps and not RewardModel(folder).gives_steps
    measured: dict[str, float] = {}
    by_token: Any = each(prompts, texts, log_metric=measured.__setitem__)
    plain = trainer.held_out[3].texts[0]
    first, second, _ = plain.split("\n")
    assert [end for end, _ in by_token[3]] == [len(first) + 1, len(first) + len(second) + 2, len(plain)]
    assert [score for _, score in by_token[3]] == pytest.approx(by_step[3].tolist(), abs=1e-4)
    assert measured == {"steps": 3.0}
    logged: dict[str, Any] = {}
    likely: Any = RewardModel(folder, transform="sigmoid")(prompts, texts, log_extra=logged.__setitem__)
    assert logged["steps"][0] == pytest.approx(by_step[0].sigmoid().tolist(), abs=1e-3)
    assert likely[0] == pytest.approx(min(logged["steps"][0]), abs=1e-3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": [], "labels": []}, r"steps must be a list of texts, none of them empty, got \[\]"),
        ({"steps": ["a", " "], "labels": [1, 1]}, r"steps must be .* got \['a', ' '\]"),
        ({"steps": ["a\nb"], "labels": [1]}, r"the step 'a\\nb' has score.step_separator = '\\n' in it"),
        ({"steps": ["a"], "labels": [1, 0]}, "labels must be a list of 1 numbers"),
        ({"steps": ["a"], "labels": [2]}, "each label must be from 0 .* got 2"),
        ({"steps": ["a"], "labels": ["+"]}, r"each label must be a number, got '\+'"),
    ],
)
def test_a_bad_line_of_steps_is_refused(
    tmp_path: Path, tiny_model_dir: Path, row: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=f"train.jsonl:1: {message}"):
        made(tmp_path, tiny_model_dir, [{"prompt": "p", **row}], score={"kind": "steps"})


def test_a_gap_says_which_of_two_is_better(tmp_path: Path, tiny_model_dir: Path):
    trainer = trained(tmp_path, tiny_model_dir, pairs(12), score={"kind": "gap"})
    assert found(tmp_path)["accuracy"] > 0.9 and found(tmp_path)["above zero"] > 0.9
    ours = trainer.learner.scores(trainer.held_out)[:, 0].view(12, 4)
    served = RewardModel(str(tmp_path / "run" / "model"))
    prompts = [e.prompt.content for e in trainer.held_out]
    chosen, rejected = zip(*(e.texts for e in trainer.held_out), strict=True)
    assert served(prompts, chosen, reference=rejected) == pytest.approx(ours[:, 0].tolist(), abs=1e-4)
    assert served(prompts, rejected, reference=chosen) == pytest.approx(ours[:, 3].tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="this model compares completions"):
        served(prompts, chosen)
    turns = [{"role": "assistant", "content": "a"}] * 2
    with pytest.raises(ValueError, match="which episodes of several turns are not"):
        served(prompts[:1], [turns], reference=[turns[:1]])
    judge = PairRewards(str(tmp_path / "run" / "model"))
    duels = list(zip(chosen, rejected, strict=True))
    assert judge(prompts, duels) == pytest.approx((ours[:, 0] - ours[:, 3]).sigmoid().tolist(), abs=1e-4)
    # what the dataset lacks is told before the run
    signature = RewardSpec("reward_model", params={"model": str(tmp_path / "run" / "model")}).load().signature
    signature.check_columns("it", ("reference",))
    with pytest.raises(ValueError, match="it needs columns that the dataset does not have: 'reference'"):
        signature.check_columns("it", ("answer",))


def test_an_input_that_does_not_fit_is_an_error_of_its_sample(tmp_path: Path, tiny_model_dir: Path):
    trained(tmp_path, tiny_model_dir, stepped(3), score={"kind": "steps"}, learner={"lr": 1e-3})
    served = RewardModel(str(tmp_path / "run" / "model"), max_tokens=4)
    with pytest.raises(ValueError, match="more than max_tokens = 4 of reward_model: raise it in params"):
        served(["say 1:"], ["a\nbbbbbb"])
