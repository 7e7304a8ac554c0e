"""Whole runs on a device that refuses what CUDA refuses, without a GPU (pretend.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device.runs import FLOAT32, trained

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="pretend.cpp is for torch 2.13"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("device")
    command = [sys.executable, "-m", "tests.device.runs", str(folder), str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_the_device_refuses_what_cuda_refuses(found: dict[str, Any]) -> None:
    refusals = found["refusals"]
    assert refusals.pop("number") == refusals.pop("indexed") == ""
    assert "can't convert cuda:0" in refusals.pop("numpy")
    said = "Expected all tensors to be on the same device"
    assert len(refusals) == 4 and all(said in reason for reason in refusals.values()), refusals


def test_a_run_there_is_the_run_on_the_cpu(found: dict[str, Any], tmp_path: Path, model: Path) -> None:
    """In float32: attention, kernels and sampling go another way, and come to the same."""
    there, here = found["float32"], trained(tmp_path / "run", model, FLOAT32, more=0)
    names = ("reward/mean", "entropy", "grad_norm", "kl/ref", "length/mean")
    for name in names:
        assert [s[name] for s in there] == pytest.approx([s[name] for s in here], rel=1e-3, abs=1e-6), name


def test_in_16_bits_with_a_critic_and_a_reference_it_learns_saves_and_resumes(found: dict[str, Any]) -> None:
    steps = found["bfloat16"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["grad_norm"] > 0 and step["mismatch/k3"] < 1e-3 for step in steps)


def test_what_an_engine_does_not_hold_is_named_wherever_it_was_sent_from(found: dict[str, Any]) -> None:
    assert "does not hold w (the parameter) as it was sent: 2 of the 2 numbers" in found["difference"]


def test_a_checkpoint_joins_one_master_at_a_time(found: dict[str, Any]) -> None:
    assert 1 <= found["room"] < 3
