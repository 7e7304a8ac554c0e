"""A run that cannot be resumed is left as it is, and one that is resumed within step 1 is the same run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoints import store
from rlhf.checkpoints.stateful import CheckpointError
from rlhf.commands.check import run_check
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.learn.optimizer import assert_shape
from tests.support import bandit_settings, changed, metrics_of, train, train_interrupted

RESUME = {"resume": "auto", "export": False, "every": 1, "keep_last": 2}


def newer_format(run: Path) -> None:
    for file in run.glob("checkpoints/*/manifest.json"):
        body = json.loads(file.read_text()) | {"format": 3}
        del body["sha256"]
        file.write_text(store._seal(body))


def unmounted(run: Path) -> None:
    shutil.move(run / "checkpoints", run.parent / "elsewhere")
    (run / "checkpoints").mkdir()


def contents(run: Path) -> dict[str, bytes]:
    left = (".lock",)
    return {
        str(f.relative_to(run)): f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name not in left
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Any]:
    """The settings of a run that has made and saved two steps."""
    settings = bandit_settings(tmp_path_factory.mktemp("saved"), tiny_model_dir, steps=2, checkpoint=RESUME)
    train(settings)
    return settings


@pytest.mark.parametrize(
    ("damage", "says"),
    [(newer_format, "format 3, this version reads format 2"), (unmounted, "step_000002 was saved")],
)
def test_without_a_checkpoint_that_loads_a_saved_run_is_refused_and_stays_as_it_was(
    saved: dict[str, Any], tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved["run_dir"], run)
    damage(run)
    before = contents(run)
    with pytest.raises(CheckpointError, match="cannot be continued: none of its checkpoints") as refused:
        train(saved | {"run_dir": str(run), "steps": 3, "seed": 5})
    assert says in str(refused.value) and "Nothing was changed" in str(refused.value)
    assert contents(run) == before


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": {"name": "ppo"}}, "the checkpoint has no critic, so its run had other settings"),
    ({"replay": {"groups_per_step": 2}}, "the checkpoint has no replay, so its run had other settings"),
    ({"model": {"path": "qwen2"}}, "the checkpoint is of another model: .* is in one of the two only"),
    ({"model": {"lora": {"rank": 2}}}, "the checkpoint is of another model: lm_head.weight, .* in one of"),
]


@pytest.mark.parametrize(("changes", "message"), OTHER)
def test_a_refused_resume_leaves_the_run_as_it_was(
    saved: dict[str, Any],
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    changes: dict[str, Any],
    message: str,
) -> None:
    """What names and shapes tell is refused by `rlhf check` too, before anything is loaded."""
    run = tmp_path / "run"
    shutil.copytree(saved["run_dir"], run)
    before = contents(run)
    other = changed(saved | {"run_dir": str(run), "steps": 3}, json.loads(json.dumps(changes)))
    if changes.get("model", {}).get("path"):
        other["model"]["path"] = str(tiny_model(changes["model"]["path"]))
    newest = re.escape(str(run / "checkpoints" / "step_000002"))
    for refuses in (lambda: list(run_check(make_config(other))), lambda: train(other)):
        with pytest.raises(ConfigError, match=f"{newest}: {message}"):
            refuses()
    assert contents(run) == before


def test_a_weight_of_another_shape_is_named_with_both_shapes() -> None:
    with pytest.raises(
        CheckpointError, match=r"another model: w is \[9, 3\] in it and \[9, 6\] in the model; go"
    ):
        assert_shape("w", torch.Size([9, 3]), torch.Size([9, 6]))


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved["run_dir"], run)
    shutil.rmtree(run / "checkpoints")
    (run / ".saved").unlink()
    train(saved | {"run_dir": str(run), "steps": 1})
    assert "it begins again with step 1" in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_ctrl_c_in_step_1_does_not_change_the_evaluation_before_training(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    evaluations: list[Any] = []
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        data = {"eval": str(tmp_path / name / "train.jsonl")}
        settings = bandit_settings(
            tmp_path / name, tiny_model_dir, steps=1, data=data, learner={"minibatches": 2}
        )
        if name == "stopped":
            train_interrupted(settings, after=1)
        train(settings | {"checkpoint": {"resume": "auto", "export": False}})
        evaluations.append(json.loads((tmp_path / name / "run" / "eval.json").read_text()))
    assert evaluations[0] == evaluations[1]
    assert [entry["step"] for entry in evaluations[0]] == [0, 1]
    assert len(metrics_of(tmp_path / "stopped")) == 1
