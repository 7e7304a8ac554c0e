"""The type to compute in: measured on a CPU, kept by a resumed run, said with what the other one costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf import compute_dtype
from rlhf.cli import main
from rlhf.compute_dtype import Speed, cpu_speed, in_words, resolve_dtype, slowness, with_dtype
from rlhf.config.load import make_config
from tests.support import bandit_settings, train

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAST, SLOW = Speed(bfloat16=1.0, float32=2.5), Speed(bfloat16=60.0, float32=1.0)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cpu(speed)`: a CPU on which products take that long."""
    return lambda speed: monkeypatch.setattr(compute_dtype, "cpu_speed", lambda: speed)


def test_a_gpu_takes_bfloat16_and_a_cpu_what_is_faster_there(cpu: Any) -> None:
    cpu(SLOW)
    assert resolve_dtype("auto", GPU) == "bfloat16"
    assert resolve_dtype("auto", CPU) == "float32" and resolve_dtype("bfloat16", CPU) == "bfloat16"
    assert slowness("bfloat16", GPU) is None and slowness("float32", CPU) is None
    told = slowness("bfloat16", CPU)
    assert told is not None and "products take 60 times as long as in float32 on this CPU" in told
    assert in_words("float32", CPU) == "float32 (products in bfloat16 take 60 times as long on this CPU)"
    cpu(FAST)
    assert resolve_dtype("auto", CPU) == "bfloat16" and slowness("bfloat16", CPU) is None
    assert in_words("bfloat16", CPU) == "bfloat16 (products in float32 take 2.5 times as long on this CPU)"
    assert in_words("bfloat16", GPU) == "bfloat16"
    told = slowness("float32", CPU)
    assert told is not None and "take 2 times" in told


def test_it_is_measured_without_the_instructions_too() -> None:
    """oneDNN is told to leave them out, as a CPU without them would; torch's threads are as before."""
    found = cpu_speed()
    assert found.bfloat16 > 0 and found.float32 > 0
    script = """
import torch
from rlhf.compute_dtype import cpu_speed
threads = torch.get_num_threads()
found = cpu_speed()
assert torch.get_num_threads() == threads
print(found.faster, found.slowdown("bfloat16"))
"""
    limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1]), **limited},
    )
    faster, slowdown = done.stdout.split()
    assert faster == "float32" and float(slowdown) > 2


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    made = bandit_settings(folder, model, steps=1, **changes)
    made["model"] = {"path": str(model)}
    return made


def test_what_was_chosen_is_in_the_run_folder_and_a_resumed_run_keeps_it(
    tmp_path: Path, tiny_model_dir: Path, cpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(SLOW)
    made = settings(tmp_path, tiny_model_dir)
    train(made)
    chosen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["dtype"]
    assert chosen == "float32"
    assert (
        "the model computes in float32 (products in bfloat16 take 60 times as long" in capsys.readouterr().out
    )
    # on another machine
    cpu(FAST)
    again = make_config(made | {"checkpoint": {"resume": "auto"}})
    earlier = (tmp_path / "run" / "config.yaml").read_text()
    assert with_dtype(again, earlier=earlier).model.dtype == "float32"
    assert with_dtype(make_config(made), earlier=earlier).model.dtype == "bfloat16"
    assert with_dtype(again).model.dtype == "bfloat16"


def test_a_slow_choice_is_told_by_check_and_by_the_run(
    tmp_path: Path, tiny_model_dir: Path, cpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(SLOW)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(tmp_path, tiny_model_dir)))
    assert main(["check", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert (
        "computes in float32 (products in bfloat16 take 60 times" in said and "warning      model" not in said
    )
    assert main(["check", str(tmp_path / "c.yaml"), "model.dtype=bfloat16"]) == 0
    warned = "model.dtype is bfloat16, in which products take 60 times as long as in float32"
    assert f"warning      {warned}" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "c.yaml"), "model.dtype=bfloat16"]) == 0
    said = capsys.readouterr()
    assert warned in said.out + said.err
