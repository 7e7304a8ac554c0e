"""The real W&B and trackio, where they are installed: each run has its own record there and continues it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf.monitoring.run_folder import RunFolder
from rlhf.monitoring.sinks import SinkError, make_sink

ROOT = Path(__file__).parents[2]
# two runs with the same name in folders with the same name; the first is resumed after the second
LOGGED = """
import sys
from pathlib import Path
from rlhf.monitoring.run_folder import RunFolder
from rlhf.monitoring.sinks import make_sink

for parent, step in (("a", 1), ("b", 1), ("a", 2)):
    folder = Path(sys.argv[2], parent, "runs", "first")
    folder.mkdir(parents=True, exist_ok=True)
    sink = make_sink(sys.argv[1], RunFolder(folder), {"model": {"path": parent}})
    sink.write(step, {"reward/mean": step / 2, "kl/ref": 0.0})
    sink.close()
"""


def log(name: str, folder: Path, **places: str) -> subprocess.CompletedProcess[str]:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    settings = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")} | places
    return subprocess.run(
        [sys.executable, "-c", LOGGED, name, str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | settings,
        cwd=ROOT,
    )


def test_trackio_keeps_runs_of_one_name_apart(tmp_path: Path) -> None:
    done = log("trackio", tmp_path)
    assert done.returncode == 0, done.stderr
    with closing(sqlite3.connect(next(tmp_path.glob("trackio/*.db")))) as records:
        found = records.execute("select run_name, step, metrics from metrics order by id").fetchall()
    names = {
        parent: "first-" + (tmp_path / parent / "runs" / "first" / "trackio_id").read_text()
        for parent in "ab"
    }
    assert [(name, step) for name, step, _ in found] == [(names["a"], 1), (names["b"], 1), (names["a"], 2)]
    assert [json.loads(metrics)["reward/mean"] for *_, metrics in found] == [0.5, 0.5, 1.0]


def test_wandb_continues_the_record_of_a_run(tmp_path: Path) -> None:
    done = log("wandb", tmp_path)
    assert done.returncode == 0, done.stderr
    for parent, count in (("a", 2), ("b", 1)):
        run = tmp_path / parent / "runs" / "first"
        records = list(run.glob("wandb/offline-run-*/*.wandb"))
        assert len(records) == count
        assert {record.stem for record in records} == {"run-" + (run / "wandb_id").read_text()}
        assert all(b"reward/mean" in record.read_bytes() for record in records)


def test_wandb_without_a_key_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = log("wandb", tmp_path, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path))
    expected = "SinkError: monitor.sinks asks for wandb, which does not start: No API key configured"
    assert done.returncode == 1 and expected in done.stderr


FAKE = """
import json, os
from pathlib import Path

class Error(Exception):
    pass

def init(**how):
    Path(os.environ["SEEN"]).write_text(json.dumps(how))
"""


@pytest.mark.parametrize(
    ("section", "variables", "project", "name"),
    [
        ({}, {}, "runs", "own"),
        ({}, {"WANDB_PROJECT": "p", "WANDB_NAME": "n"}, "p", "n"),
        ({"project": "sp", "name": "sn"}, {"WANDB_PROJECT": "p", "WANDB_NAME": "n"}, "sp", "sn"),
    ],
)
def test_project_and_name_come_from_settings_variables_or_folders(
    section: dict[str, str],
    variables: dict[str, str],
    project: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "wandb.py").write_text(FAKE)
    (tmp_path / "runs" / "own").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    for key in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    make_sink("wandb", RunFolder(tmp_path / "runs" / "own"), {"monitor": section})
    monkeypatch.delitem(sys.modules, "wandb")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["project"], seen["name"]) == (project, name)


def test_what_a_sink_needs_and_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        SinkError, match=r"installed but cannot be imported: No module named 'no_such_package'"
    ):
        make_sink("wandb", RunFolder(tmp_path), {})
