"""Files of a run that are damaged: a sentence says so, and what can be read is still used."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

import pytest

from rlhf.config.load import ConfigError, make_config
from rlhf.config.overrides import read_settings
from rlhf.data.rows import read_rows
from rlhf.files import sync, write_atomically
from rlhf.monitoring.records import read_eval, read_metrics
from rlhf.monitoring.run_folder import RunFolder, RunFolderError
from tests.config.test_config import settings

NAN = float("nan")
METRICS = '{"step": 1}\n\0\0\0\n[3]\n{"step": 2}\n{"ste'


def test_damaged_lines_are_counted_when_a_run_resumes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(METRICS)
    lost = run.cut(after=2)
    assert lost == [f"{run.metrics}: 2 damaged lines are dropped, the first is line 2"]
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert run.cut(after=2) == []


def test_a_report_leaves_damaged_lines_out_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(METRICS)
    with caplog.at_level(logging.WARNING):
        assert [entry["step"] for entry in read_metrics(run)] == [1, 2]
    assert caplog.messages == [f"{run.metrics}: 2 damaged lines are left out"]


@pytest.mark.parametrize("text", ['[{"step": 0', "[1]", "{}", "[" * 100_000])
def test_a_torn_eval_json_is_put_aside_when_a_run_resumes(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    run.evaluations.write_text(text)
    lost = run.cut(after=2)
    if text != "{}":
        assert len(lost) == 1 and "eval.json cannot be read" in lost[0]
        assert (tmp_path / "eval.json.damaged").read_text() == text
    assert read_eval(run) == []


@pytest.mark.parametrize("content", [b"steps: [1", b"\xff\xfe\x00", b"- 1\n", b"a: " + b"[" * 5000])
def test_a_garbled_config_yaml_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.config.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"config.yaml cannot be read .*bring it back"):
        run.settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: " + "[" * 5000, "nested too deeply"), ("steps: " + "9" * 5000, "is not YAML: Exceeds the limit")],
)
def test_settings_that_no_parser_takes_are_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_settings(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("line", "says"), [("[" * 100_000, "nested too deeply"), ("9" * 5000, "Exceeds the limit")]
)
def test_lines_of_data_that_no_parser_takes_are_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"data.jsonl:2: {says}"):
        list(read_rows(file))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"reward": {"functions": [{"path": "length", "weight": NAN}]}}, "weight"),
        ({"reward": {"functions": [{"path": "length", "weights": {"a": NAN}}]}}, "weights"),
        ({"learner": {"lr": float("inf")}}, "learner.lr"),
        ({"algorithm": {"name": "grpo", "clip_low": NAN}}, "algorithm.clip_low"),
        ({"algorithm": {"name": "grpo", "kl": {"coef": NAN}}}, "algorithm.kl.coef"),
    ],
)
def test_a_setting_that_is_not_a_number_is_named(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*(finite|number)"):
        make_config(settings() | changes)


def test_a_file_system_without_locks_or_fsync_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(os, "fsync", refused)
    run = RunFolder(tmp_path / "run")
    with run.claim(config="steps: 1\n", resume=False):
        write_atomically(run.metrics, json.dumps({"step": 1}))
        sync(run.metrics)
    assert "has no locks" in caplog.text
    assert run.settings() == "steps: 1\n"
