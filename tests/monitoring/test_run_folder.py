"""One process owns a run folder, nothing is overwritten by accident, a resumed run logs each step once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf.monitoring.run_folder import STARTED_IN, RunFolder, RunFolderError
from tests.checkpoints.support import save


def test_a_claimed_folder_holds_the_resolved_config(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "first")
    with run.claim(config="steps: 20\n", resume=False):
        assert run.config.read_text() == "steps: 20\n"
        assert not run.has_run()


HOLDER = """
    import sys, time
    from pathlib import Path
    from rlhf.monitoring.run_folder import RunFolder

    with RunFolder(Path(sys.argv[1])).claim(config="", resume=True):
        print("held", flush=True)
        time.sleep(600)
"""


def test_a_folder_in_use_is_refused_with_the_holders_pid_and_free_when_it_was_killed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        expected = f"in use by process {holder.pid} on {os.uname().nodename} since 20"
        with pytest.raises(RunFolderError, match=expected), run.claim(config="", resume=True):
            pass
        holder.send_signal(signal.SIGKILL)
    with run.claim(config="", resume=True):
        assert f"process {os.getpid()} on" in run.lock.read_text()


def test_one_process_cannot_claim_a_folder_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.claim(config="first", resume=False):
        with pytest.raises(RunFolderError, match="in use"), run.claim(config="second", resume=True):
            pass
        assert run.config.read_text() == "first"


@pytest.mark.parametrize("left", ["metrics", "checkpoint"])
def test_an_earlier_run_is_overwritten_only_when_resume_was_asked_for(tmp_path: Path, left: str) -> None:
    run = RunFolder(tmp_path)
    with run.claim(config="old", resume=False):
        if left == "metrics":
            run.metrics.write_text('{"step": 1}\n')
        else:
            save(run.checkpoints, step=1, tensors={}, state={}, keep_last=1)
    with (
        pytest.raises(RunFolderError, match=r"already holds a run.*resume=auto continues.*another run_dir"),
        run.claim(config="new", resume=False),
    ):
        pass
    assert run.config.read_text() == "old"
    with run.claim(config="new", resume=True):
        # until the run has been resumed
        assert run.config.read_text() == "old"
        run.write_settings("new")
        assert run.config.read_text() == "new"


def test_a_run_that_failed_before_its_first_step_may_be_started_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for text in ("first try", "second try"):
        with run.claim(config=text, resume=False):
            run.metrics.touch()
    assert run.config.read_text() == "second try"


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("of another program")
    with (
        pytest.raises(RunFolderError, match="not those of a run"),
        RunFolder(tmp_path).claim(config="", resume=True),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    file = tmp_path / "config.yaml"
    with pytest.raises(RunFolderError, match="is a file"), RunFolder(file).claim(config="", resume=True):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="cannot be written"), run.claim(config="", resume=False):
        pass


def test_leftovers_of_a_killed_run_are_cleared_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.claim(config="", resume=False):
        (tmp_path / "eval.json.tmp-123").touch()
        for name in ("model.tmp-4711", "adapter.replaced-4711", "model.tmp-mine", "notes.tmp-1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a file").touch()
    with run.claim(config="", resume=False):
        kept = sorted(p.name for p in tmp_path.iterdir())
    # the last two are no names that a run gives
    assert kept == [".lock", "config.yaml", "model.tmp-mine", "notes.tmp-1"]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "reward/mean": step / 10}) for step in range(6)]
    run.metrics.write_text("\n".join(lines) + '\n{"step": 6, "rew')
    # U+2028 ends a line for str.splitlines, not in JSON
    run.samples.write_text('{"step": 2, "prompt": "größer\u2028als"}\n{"step": 5, "prompt": "b"}\n')
    run.evaluations.write_text(json.dumps([{"step": 0, "accuracy": 0.1}, {"step": 5, "accuracy": 0.4}]))
    run.cut(after=3)
    assert run.metrics.read_text().splitlines() == lines[:4]
    assert run.samples.read_text() == '{"step": 2, "prompt": "größer\u2028als"}\n'
    assert json.loads(run.evaluations.read_text()) == [{"step": 0, "accuracy": 0.1}]
    run.cut(after=-1)
    assert run.metrics.read_text() == run.samples.read_text() == ""
    assert json.loads(run.evaluations.read_text()) == []


def test_cutting_a_folder_without_streams_changes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path).cut(after=3)
    assert list(tmp_path.iterdir()) == []


def test_a_run_knows_where_its_relative_paths_start_also_after_it_was_moved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "project" / "runs" / "a")
    run.path.mkdir(parents=True)
    assert run.started_in() is None
    run.config.write_text("run_dir: runs/a\n")
    assert run.started_in() == tmp_path / "project"
    run.config.write_text(f"{STARTED_IN}{tmp_path}\nrun_dir: /elsewhere\n")
    assert run.started_in() == tmp_path
    run.config.write_text(f"{STARTED_IN}/gone\nrun_dir: runs/a\n")
    assert run.started_in() == tmp_path / "project"
    run.config.write_text(f"{STARTED_IN}/gone\nrun_dir: /gone/a\n")
    assert run.started_in() is None
