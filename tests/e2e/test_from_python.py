"""`Trainer` with Python objects: a dict of settings, functions as rewards, rows as datasets; its result."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # pyright: ignore[reportMissingTypeStubs]
import pytest
import yaml

import rlhf
from rlhf.config.load import load_config, make_config
from rlhf.config.section import ConfigError
from rlhf.monitoring.objects import with_objects
from rlhf.monitoring.run_folder import RunFolderError
from rlhf.rewards.builtin import length
from rlhf.rewards.plugin import RewardSpec, load_reward
from rlhf.trainer import Trainer
from tests.support import bandit_settings, metrics_of, without_clocks

ROWS = [{"prompt": f"say {i}:", "answer": i} for i in range(40)]
ROOT = Path(__file__).parents[2]
SEEN = (row for row in ROWS)
"""What no pickle can hold."""


def settings_of(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A small run's settings without data and reward."""
    settings = bandit_settings(folder, model, **{"steps": 2, "rollout": {"group_size": 4}, **changes})
    del settings["data"]["train"], settings["reward"]
    return settings


def test_objects_give_the_run_that_paths_give(tmp_path: Path, tiny_model_dir: Path) -> None:
    scale = 1.0

    def share_of_a(completions: list[str], answer: list[int], **_: Any) -> list[float]:
        assert all(isinstance(a, int) for a in answer)
        return [scale * text.count("a") / max(1, len(text)) for text in completions]

    held_out = datasets.Dataset.from_list(ROWS[:4])
    settings = settings_of(tmp_path, tiny_model_dir, checkpoint={"export": True})
    result = Trainer(settings, reward=share_of_a, train=ROWS, eval=held_out).run()
    objects = without_clocks(metrics_of(tmp_path))
    named = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [json.loads(line) for line in Path(named["data"]["train"]).read_text().splitlines()] == ROWS
    assert named["reward"]["functions"][0]["path"] == f"in memory ({__file__}):share_of_a"

    assert result.run_dir == tmp_path / "run" and result.steps == 2
    assert result.metrics["reward/mean"] == objects[-1]["reward/mean"]
    assert result.before is not None and result.after is not None
    assert (result.before.step, result.after.step, result.after.measure) == (0, 2, "reward")
    assert result.after.low <= result.after.value <= result.after.high
    assert result.model is not None and result.model == tmp_path / "run" / "model"
    assert (result.model / "config.json").is_file()

    by_path = tmp_path / "by_path"
    by_path.mkdir()
    paths = bandit_settings(by_path, tiny_model_dir, steps=2, rollout={"group_size": 4})
    paths["data"]["eval"] = str(by_path / "eval.jsonl")
    (by_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    Trainer(make_config(paths)).run()
    assert without_clocks(metrics_of(by_path)) == objects


def test_a_resumed_run_needs_the_function_again(tmp_path: Path, tiny_model_dir: Path) -> None:
    def as_run(steps: int) -> list[dict[str, Any]]:
        settings = settings_of(tmp_path, tiny_model_dir, steps=steps, checkpoint={"resume": "auto"})
        Trainer(settings, reward=lambda completions: [float(len(c)) for c in completions], train=ROWS).run()
        return without_clocks(metrics_of(tmp_path))

    first = as_run(1)
    config = tmp_path / "run" / "config.yaml"
    before = config.read_text()
    assert as_run(2)[0] == first[0]
    assert config.read_text().replace("steps: 2\n", "steps: 1\n") == before
    assert len(list((tmp_path / "run" / "data").iterdir())) == 1
    said = rf"lambda was given from Python as an object, in memory \({re.escape(__file__)}\), and no other"
    with pytest.raises(ValueError, match=said):
        Trainer(load_config(config, ["steps=3"]))
    with pytest.raises(RunFolderError, match="already holds a run"):
        with_objects(settings_of(tmp_path, tiny_model_dir), reward=length, train=ROWS[:20])
    # what is in the run folder stays as it is where other rows are given
    train = Path(yaml.safe_load(before)["data"]["train"])
    text = train.read_text()
    resumed = settings_of(tmp_path, tiny_model_dir, checkpoint={"resume": "auto"})
    other = with_objects(resumed, reward=length, train=ROWS[:20])[0]
    assert train.read_text() == text and other.data.train != str(train)


def test_a_function_is_named_by_where_it_is_or_sent_whole(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "at_hand.py").write_text("def brief(completions):\n    return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    brief = importlib.import_module("at_hand").brief
    settings = settings_of(tmp_path, tiny_model_dir)
    here = f"in memory ({__file__})"
    entries = [brief, length, "numeric_match", {"path": partial(twice, by=3.0), "weight": 0.5}]
    entries += [lambda completions: [1.0], lambda completions: [2.0]]
    config, pickles = with_objects(settings, reward=entries, train=ROWS)
    found = {function.path: function.weight for function in config.reward.functions}
    assert found == {
        f"{tmp_path}/at_hand.py:brief": 1.0,
        "rlhf.rewards.builtin:length": 1.0,
        "numeric_match": 1.0,
        f"{here}:twice": 0.5,
        f"{here}:lambda": 1.0,
        f"{here}:lambda_2": 1.0,
    }
    values = [
        load_reward(RewardSpec(path, pickled=pickled))({"completions": ["a"]})
        for path, pickled in pickles.items()
    ]
    assert values == [[3.0], [1.0], [2.0]]


def twice(completions: list[str], by: float) -> list[float]:
    return [by for _ in completions]


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        (
            {"train": "train.jsonl"},
            r"train must be rows .* got str 'train.jsonl'; a path goes into data.train",
        ),
        ({"train": [ROWS[0], "say 1:"]}, r"train, row 2: expected a dict, got str 'say 1:'"),
        ({"train": ROWS, "eval_rows": [{"prompt": b"a"}]}, r"eval, row 1: it cannot be written as JSON"),
        (
            {"train": ROWS, "reward": lambda completions: next(SEEN)},
            r"lambda cannot be sent to its worker",
        ),
        (
            {"train": ROWS, "reward": [{"path": twice, "wieght": 1}]},
            r"reward.functions.0.wieght",
        ),
        ({"reward": twice}, r"data.train"),
    ],
)
def test_objects_that_cannot_be_used_are_refused(
    tmp_path: Path, tiny_model_dir: Path, objects: dict[str, Any], said: str
) -> None:
    given = {"reward": twice, **objects}
    with pytest.raises(ConfigError, match=said):
        with_objects(settings_of(tmp_path, tiny_model_dir), **given)
    assert not (tmp_path / "run").exists()


def test_a_dict_is_read_as_a_file_is_and_stays_as_it_is(tmp_path: Path, tiny_model_dir: Path) -> None:
    settings = bandit_settings(tmp_path, tiny_model_dir)
    settings["model"] = tiny_model_dir
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "model": str(tiny_model_dir)}))
    changes = ["steps=3", "rollout.group_size=2", "model.dtype=float32"]
    assert load_config(settings, changes) == load_config(file, changes)
    assert settings["steps"] == 12 and settings["rollout"]["group_size"] == 8
    config = load_config(settings)
    assert make_config(config.to_dict()) == config == with_objects(config)[0]


def test_the_guides_example_runs_as_a_script(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (ROOT / "docs" / "training.md").read_text().split("## 12. From Python")[1]
    code = section.split("```python\n")[1].split("```")[0]
    smaller = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': f'{{"path": "{tiny_model_dir}", "dtype": "float32"}}',
        '"steps": 20': '"steps": 1',
        '"prompts_per_step": 16, "group_size": 8': '"prompts_per_step": 2, "group_size": 2',
        "rows[1::2]": "rows[:2]",
    }
    for old, new in smaller.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    (tmp_path / "script.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].endswith(" runs/from_python/model")
    named = yaml.safe_load((tmp_path / "runs/from_python/config.yaml").read_text())
    assert named["reward"]["functions"][0]["path"] == f"in memory ({tmp_path}/script.py):correct"


def test_an_editor_is_shown_what_is_public() -> None:
    assert dir(rlhf) == sorted(rlhf.__all__) and all(hasattr(rlhf, name) for name in dir(rlhf))
