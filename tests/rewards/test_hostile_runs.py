"""Whole runs with misbehaving rewards: they continue, or stop and name the function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.rewards.workers.pool import RewardError
from tests.rewards.test_remote import Service, serving
from tests.support import bandit_settings, metrics_of, train

HOSTILE = '''
import ctypes, os, time


def dies_now_and_then(completions, **_):
    """Of every eight samples one loops, one segfaults and one exits; by their texts, so at any worker."""
    for text in completions:
        match sum(map(ord, text)) % 8:
            case 0:
                time.sleep(600)
            case 1:
                ctypes.string_at(0)
            case 2:
                os._exit(0)
    return [text.count("a") / max(1, len(text)) for text in completions]
'''


def hostile_settings(folder: Path, model: Path, reward: dict[str, Any], share: float) -> dict[str, Any]:
    (folder / "hostile.py").write_text(HOSTILE)
    return bandit_settings(
        folder,
        model,
        steps=2,
        rollout={"prompts_per_step": 4, "group_size": 4},
        reward={"functions": [{"workers": 2, "timeout": 1.0, **reward}], "max_failed_share": share},
    )


def test_a_run_goes_on_without_the_samples_that_fail(tmp_path: Path, tiny_model_dir: Path) -> None:
    reward = {"path": f"{tmp_path}/hostile.py:dies_now_and_then"}
    train(hostile_settings(tmp_path, tiny_model_dir, reward, share=0.95))
    records = metrics_of(tmp_path)
    assert len(records) == 2
    for record in records:
        assert 0 < record["reward/failed"] < 1
        assert record["reward/failed/dies_now_and_then"] == record["reward/failed"]


def test_a_run_stops_and_names_the_function_the_cause_and_a_sample(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    reward = {"path": f"{tmp_path}/hostile.py:dies_now_and_then"}
    with pytest.raises(
        RewardError,
        match=r"of 16 samples have no reward, more than max_failed_share = 0.0: dies_now_and_then failed on "
        r"\d+ \((it took longer than 1 s|it was killed by SIGSEGV|it exited with status 0) for train.jsonl:",
    ):
        train(hostile_settings(tmp_path, tiny_model_dir, reward, share=0.0))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("drop", r"remote failed on \d+ \(RemoteError: http://\S+/drop: no answer in 2 attempts"),
        ("slow", r"remote failed on \d+ \(it took longer than 1 s for"),
    ],
)
def test_a_run_without_its_service_stops_and_names_it(
    tmp_path: Path, tiny_model_dir: Path, path: str, message: str
) -> None:
    with serving() as service:
        reward = {"path": "remote", "params": address(service, path)}
        with pytest.raises(RewardError, match=message):
            train(hostile_settings(tmp_path, tiny_model_dir, reward, share=0.5))


def test_a_run_outlives_a_service_that_drops_every_other_connection(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with serving() as service:
        reward = {"path": "remote", "params": address(service, "drop-odd"), "timeout": 60.0}
        train(hostile_settings(tmp_path, tiny_model_dir, reward, share=0.0))
    assert [record["reward/failed"] for record in metrics_of(tmp_path)] == [0.0, 0.0]


def address(service: Service, path: str) -> dict[str, Any]:
    return {"url": service.url(path), "attempts": 2 if path != "drop-odd" else 20, "pause": 0.01}
