"""Faults are named by the process that notices them first; no run hangs, and no checkpoint is lost."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from rlhf.checkpoints.store import latest
from tests.faults.kills import Straight, resumed
from tests.faults.processes import Fault, launch, logged_steps, settings_of
from tests.support import metrics_of

BACKWARD = "torch.autograd:backward"


@pytest.mark.multi
def test_a_frozen_rank_is_named_by_the_one_that_waits_for_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    settings = settings_of(tmp_path, tiny_model_dir, distributed={"timeout": 30})
    fault = Fault(BACKWARD, 3, action="freeze", rank=1)
    waiting = launch(settings, tmp_path / "log", ranks=2, fault=fault)[0]
    assert waiting.code == 3, waiting.said
    assert "rank 1 has given no sign of life" in waiting.said and "in learn, step 2" in waiting.said


@pytest.mark.multi
def test_a_rank_that_fails_ends_the_other_with_its_reason(tmp_path: Path, tiny_model_dir: Path) -> None:
    fault = Fault("rlhf.rewards.scoring:Rewards.gather", 2, action="raise", rank=1)
    fine, failed = launch(settings_of(tmp_path, tiny_model_dir), tmp_path / "log", ranks=2, fault=fault)
    assert failed.code == 1 and "ArithmeticError: an accident" in failed.said
    assert fine.code == 3, fine.said
    assert "rank 1 failed in reward" in fine.said and "ArithmeticError: an accident" in fine.said


@pytest.mark.multi
@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_dies_while_shards_are_saved_ends_the_one_that_needs_its_part(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight, background: bool
) -> None:
    """Rank 0 waits for a file, without a connection that could break; it sees that the process is gone."""
    settings = settings_of(tmp_path, tiny_model_dir, "sharded", checkpoint={"background": background})
    fault = Fault("rlhf.checkpoints.saver:write_atomically", 1, rank=1)
    waiting, killed = launch(settings, tmp_path / "log", ranks=2, fault=fault)
    assert killed.code == -9 and waiting.code == 3, waiting.said
    assert "the process of rank 1 (number" in waiting.said, waiting.said
    if not background:
        assert "rank 0, in save, step" in waiting.said and "without an error of its own" in waiting.said
    newest = latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step_000002"
    resumed(tmp_path, settings, 2, straight(2, "sharded"))


@pytest.mark.multi
def test_a_signal_to_one_rank_saves_and_ends_both(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight
) -> None:
    settings = settings_of(tmp_path, tiny_model_dir)
    fault = Fault("rlhf.rollout.native.engine:NativeEngine._decode", 30, action="term", rank=1)
    for ended in launch(settings, tmp_path / "log", ranks=2, fault=fault):
        assert ended.code == 0, ended.said
    done = logged_steps(tmp_path)
    newest = latest(tmp_path / "run" / "checkpoints")
    assert done < 5 and newest is not None and newest.name == f"step_{done:06d}"
    said = (tmp_path / "log.0").read_text()
    assert f"stopped after step {done} of 5; everything is saved" in said
    resumed(tmp_path, settings, 2, straight(2))


@pytest.mark.parametrize(
    ("fault", "limits", "message"),
    [
        (Fault("rlhf.checkpoints.store:save_file", 2, action="no space"), {}, "GiB are free; make room"),
        (None, {"RLIMIT_FSIZE": 100_000}, "File too large"),
    ],
    ids=["no space is left", "files may not grow"],
)
def test_a_full_disk_is_named_and_nothing_that_was_saved_is_lost(
    tmp_path: Path,
    tiny_model_dir: Path,
    straight: Straight,
    fault: Fault | None,
    limits: dict[str, int],
    message: str,
) -> None:
    settings = settings_of(tmp_path, tiny_model_dir)
    (ended,) = launch(settings, tmp_path / "log", fault=fault, limits=limits)
    assert ended.code == 2 and message in ended.said and "Traceback" not in ended.said, ended.said
    assert "the checkpoint of step" in ended.said and "Earlier checkpoints are as they were" in ended.said
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not list(checkpoints.glob("*.tmp-*"))
    saved = latest(checkpoints)
    # the fault is in the second checkpoint; with a limit on file sizes it is already in the first
    assert saved is None if fault is None else saved is not None and saved.name == "step_000002"
    resumed(tmp_path, settings, 1, straight(1))


def test_out_of_memory_says_which_setting_to_lower(tmp_path: Path, tiny_model_dir: Path) -> None:
    changes: dict[str, Any] = {"learner": {"microbatch_tokens": 100_000}}
    changes["rollout"] = {"group_size": 64, "max_completion_tokens": 32, "kv_cache_gib": 1.0}
    settings = settings_of(tmp_path, tiny_model_dir, "grpo", **changes)
    fault = Fault("rlhf.learn.learner:Learner._losses", 0, action="little memory")
    (ended,) = launch(settings, tmp_path / "log", fault=fault)
    assert ended.code == 2, ended.said
    assert "out of memory in learn, step 1: lower learner.microbatch_tokens" in ended.said
    assert "Traceback" not in ended.said


def test_a_loss_that_is_not_a_number_changes_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The update whose gradient is not finite is skipped and counted."""
    settings = settings_of(tmp_path, tiny_model_dir)
    fault = Fault("rlhf.algos.reduction:token_sum", 2, action="nan", after=True)
    (ended,) = launch(settings, tmp_path / "log", fault=fault)
    assert ended.code == 0, ended.said
    records = metrics_of(tmp_path)
    assert sum(r["update/skipped"] for r in records) == 1
    assert all(r["kl/ref"] < 1 for r in records)


def test_checkpoints_may_lie_on_another_device(
    tmp_path: Path, tiny_model_dir: Path, straight: Straight
) -> None:
    with elsewhere() as folder:
        if folder.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system here")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(folder)
        settings = settings_of(tmp_path, tiny_model_dir)
        fault = Fault(BACKWARD, 7)
        assert launch(settings, tmp_path / "log", fault=fault)[0].code == -9
        assert latest(tmp_path / "run" / "checkpoints") is not None
        resumed(tmp_path, settings, 1, straight(1))


@contextmanager
def elsewhere() -> Generator[Path]:
    folder = Path("/dev/shm") / f"tandem-{uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: Path, tiny_model_dir: Path) -> None:
    settings = settings_of(tmp_path, tiny_model_dir)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with (tmp_path / "run" / ".lock").open("w+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 17 on another")
        other.flush()
        (ended,) = launch(settings, tmp_path / "log")
    assert ended.code == 2 and "is in use by process 17 on another" in ended.said, ended.said


def test_a_folder_that_cannot_be_written_is_refused_before_weights_are_loaded(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    # a read-only folder would not stop root
    settings = settings_of(tmp_path, tiny_model_dir, run_dir="/proc/self/run")
    fault = Fault("rlhf.components:load_policy", 0, action="raise")
    (ended,) = launch(settings, tmp_path / "log", fault=fault)
    assert ended.code == 2 and "the run folder /proc/self/run cannot be written" in ended.said, ended.said
