"""`rlhf init`: a first config that passes the check, and a first reward function that tests itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.commands.start import first_config, sizes
from rlhf.config.load import load_config
from rlhf.preflight.machine import Machine
from rlhf.small_model import SmallModelError

SMALL = Machine("CPU, 1 thread(s)", memory=0, flops=1e12, bandwidth=1e10)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machine, "measured", lambda *_, **__: replace(SMALL, memory=64 << 30))
    yield tmp_path


def write_data(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["init", *arguments]) == 2
    return capsys.readouterr().err


def test_the_config_of_own_data_and_reward_passes_the_check(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--reward", "my reward.py"]) == 0
    done = subprocess.run([sys.executable, "my reward.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "4 completions" in done.stdout
    # a token for each character: the longest prompt has 70
    write_data("questions.jsonl", [{"prompt": "x" * n, "answer": n} for n in (20, 70, 30, 40, 50)])
    options = [
        "--model",
        str(tiny_model_dir),
        "--data",
        "questions.jsonl",
        "--reward",
        "my reward.py:correct",
    ]
    assert main(["init", "mine.yaml", *options]) == 0
    assert "rlhf check mine.yaml" in capsys.readouterr().out
    assert main(["check", "mine.yaml"]) == 0
    plan = capsys.readouterr().out
    assert "5 prompts of 20 to 70 tokens" in plan and "warning" not in plan
    config = load_config("mine.yaml")
    assert (config.run_dir, config.data.train, config.data.eval) == ("runs/mine", "questions.jsonl", None)
    assert [f.path for f in config.reward.functions] == ["my reward.py:correct"]
    # 70 in multiples of 64; of 512 positions 384 are left, and on a CPU 128 are taken
    assert (config.data.max_prompt_tokens, config.rollout.max_completion_tokens) == (128, 128)
    # the largest power of two of at most 5 prompts; twice the data would be ceil(10 / 4) = 3 steps, below 20
    assert (config.rollout.prompts_per_step, config.steps) == (4, 20)


def test_without_data_it_is_the_quickstart(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_config, "make_small_model", lambda: tiny_model_dir)
    assert main(["init", "mine.yaml"]) == 0
    assert main(["check", "mine.yaml"]) == 0
    plan = capsys.readouterr().out
    assert "67 prompts" in plan and "33 prompts x 8 samples" in plan and "numeric_match" in plan
    shipped = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    config = load_config("mine.yaml")
    assert (config.rollout, config.steps) == (shipped.rollout, shipped.steps)
    assert (config.learner, config.algorithm) == (shipped.learner, shipped.algorithm)


@pytest.mark.parametrize(
    ("answers", "reward"),
    [([8, 2.5], "numeric_match"), (["1,000", "so\n#### 8"], "numeric_match"), (["Paris", 8], "exact_match")],
)
def test_a_built_in_reward_fits_the_column_answer(answers: list[Any], reward: str) -> None:
    write_data("data.jsonl", [{"prompt": "?", "answer": answer} for answer in answers])
    assert first_config.built_in("data.jsonl") == f"rlhf.rewards.builtin:{reward}"


def test_sizes_shrink_until_a_fifth_of_the_memory_is_free(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data("data.jsonl", [{"prompt": "x" * 30, "answer": 1}] * 40)
    options = ["--model", str(tiny_model_dir), "--data", "data.jsonl"]
    _, roomy = first_config.first_config("a.yaml", str(tiny_model_dir), "data.jsonl", None, None)
    full = roomy.peak
    monkeypatch.setattr(Machine, "measured", lambda *_, **__: replace(SMALL, memory=full))
    assert main(["init", "less.yaml", *options]) == 0
    # one step of the way is enough: 16 prompts with 128 completions of 128 tokens are cut into shorter pieces
    less = load_config("less.yaml")
    assert less.learner.microbatch_tokens == 1024 and not less.model.gradient_checkpointing
    monkeypatch.setattr(Machine, "measured", lambda *_, **__: replace(SMALL, memory=1 << 10))
    monkeypatch.setattr(sizes, "find_spec", lambda _: None)
    assert main(["init", "least.yaml", *options]) == 0
    assert "warning      it will not fit on this machine" in capsys.readouterr().out
    least = load_config("least.yaml")
    assert (
        least.model.gradient_checkpointing and least.rollout.kv_cache_gib == 1.0 and least.model.lora is None
    )


def test_it_overwrites_nothing_and_says_what_it_needs(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old.yaml", "old.py"):
        Path(name).write_text("mine")
    assert "old.yaml exists" in refused(capsys, "old.yaml")
    assert "old.py exists" in refused(capsys, "--reward", "old.py")
    assert "rlhf init FILE.yaml" in refused(capsys)
    assert "rlhf init FILE.yaml" in refused(capsys, "--reward", "old.py:correct")
    assert "FILE.yaml" in refused(capsys, "config.json")
    assert "rlhf init --reward old.py alone" in refused(capsys, "new.yaml", "--reward", "old.py")
    model = ["--model", str(tiny_model_dir)]
    assert "there is no dataset nowhere.jsonl" in refused(
        capsys, "new.yaml", *model, "--data", "nowhere.jsonl"
    )
    write_data("plain.jsonl", [{"prompt": "?", "tag": 1}])
    assert "(it has prompt, tag)" in refused(capsys, "new.yaml", *model, "--data", "plain.jsonl")
    write_data("long.jsonl", [{"prompt": "x" * 500, "answer": 1}])
    assert "500 tokens" in refused(capsys, "new.yaml", *model, "--data", "long.jsonl")

    def missing() -> Path:
        raise SmallModelError("run: pip install it")

    monkeypatch.setattr(first_config, "make_small_model", missing)
    assert "run: pip install it; or name a model with --model" in refused(capsys, "new.yaml")
    assert [Path(name).read_text() for name in ("old.yaml", "old.py")] == ["mine", "mine"]
    assert not Path("new.yaml").exists()
