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
