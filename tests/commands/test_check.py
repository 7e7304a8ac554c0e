"""`rlhf check`: what a run will do, and how much of the data exceeds the token limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from benchmarks.model_kinds import small_config, small_model
from rlhf.cli import main
from rlhf.commands.check import quantile, spaced
from rlhf.preflight import trial
from tests.conftest import save_tiny_tokenizer
from tests.support import bandit_settings


@pytest.fixture
def check(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]):
    def check(rows: list[dict[str, Any]] | None = None, *arguments: str) -> str:
        settings = bandit_settings(tmp_path, tiny_model_dir)
        if rows is not None:
            (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
        assert main(["check", str(tmp_path / "mine.yaml"), *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return check


def test_answers_longer_than_completions_may_be_are_a_warning(check) -> None:
    # one token for each character
    rows = [{"prompt": "x" * (i + 1), "solution": "y" * 50, "label": "a", "answer": i} for i in range(20)]
    said = check(rows, "rollout.max_completion_tokens=20")
    assert "column solution: 50 tokens in the median, 50 at 95 %; completions end at 20" in said
    assert "warning      20 of 20 texts in the column solution are longer" in said
    assert "column label" not in said and "column answer" not in said
    said = check(rows, "rollout.max_completion_tokens=60")
    assert "column solution" in said and "are longer" not in said


def test_prompts_near_the_limit_are_counted(check) -> None:
    said = check([{"prompt": "x" * n} for n in [10] * 15 + [30, 31, 31, 31, 32]])
    assert "prompts: 31 tokens at 95 %, limit 32; 5 of 20 examined are within a tenth of it" in said


def test_how_groups_are_packed_is_tried_on_a_small_copy_of_the_model(check, tmp_path: Path) -> None:
    assert "packing      prompts are shared within a group" in check()
    size = save_tiny_tokenizer(tmp_path / "bloom")
    small_model(small_config("bloom", vocab_size=size)).save_pretrained(tmp_path / "bloom")
    assert "packing      sequences are padded" in check(None, f"model.path={tmp_path / 'bloom'}")


def test_a_small_copy_has_a_layer_of_each_kind(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    given = small_config("gemma3_text", num_hidden_layers=12, layer_types=kinds * 2, intermediate_size=96)
    given.save_pretrained(tmp_path)
    copy = trial.small_config(given)
    assert copy.layer_types == ["sliding_attention", "full_attention"] and copy.num_hidden_layers == 2
    assert copy.intermediate_size == 64 and given.num_hidden_layers == 12
    model = trial.small_copy(str(tmp_path))
    assert model is not None and len(cast(Any, model).model.layers) == 2


TRIED = """
def near(completions, answer, **_):
    return [float(c == a) for c, a in zip(completions, answer)]

def chats(completions, **_):
    return [float(len(c[-1]["content"])) for c in completions]

def alone(completions, **_):
    return 1.0

def parts(completions, **_):
    return [{"short": -len(c), "right": 0.0} for c in completions]
"""


def test_each_reward_function_is_called_once(check, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(TRIED)
    functions = [f"{tmp_path}/rewards.py:{name}" for name in ("near", "chats", "parts")]
    said = check([{"prompt": "abc", "answer": "de"}], f"reward.functions=[{', '.join(functions)}]")
    assert "reward       near: 0 for an empty completion, 1 for 'de'" in said
    assert "reward       parts: short 0, right 0 for an empty completion, short -2, right 0 for 'de'" in said
    assert "chats: no reward for an empty completion, no reward for 'de'" in said
    assert "failed on both: TypeError: string indices must be integers" in said
    assert "; prompts of plain text have completions of plain text, not messages" in said


def test_a_function_that_returns_no_list_is_refused(
    check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(TRIED)
    check([{"prompt": "abc"}])
    assert (
        main(["check", str(tmp_path / "mine.yaml"), f"reward.functions=[{tmp_path}/rewards.py:alone]"]) == 2
    )
    assert "alone must return" in capsys.readouterr().err


def test_a_run_that_would_be_refused_is_said_at_once(check, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "holds a run, which rlhf train will not overwrite" in check()
    said = check(None, "checkpoint.resume=auto")
    assert "the run in the folder is continued" in said and "will not overwrite" not in said


def test_every_setting_in_force_can_be_shown(check) -> None:
    assert "weight_decay" not in check()
    said = check(None, "--settings", "learner.lr=3e-5")
    shown = yaml.safe_load(said.partition("every setting in force:")[2])
    assert shown["learner"]["lr"] == 3e-5 and shown["learner"]["weight_decay"] == 0.0


def test_it_says_what_it_will_take(check) -> None:
    said = check()
    assert "GiB a rank at the fullest moment" in said and "a step with completions of full length" in said


def test_quantiles_and_samples_by_hand() -> None:
    assert [quantile([1, 2, 3, 4], q) for q in (0.0, 0.25, 0.5, 0.95, 1.0)] == [1, 1, 2, 4, 4]
    assert spaced(list(range(10)), 5) == [0, 2, 4, 6, 8] and spaced([1, 2], 5) == [1, 2]
