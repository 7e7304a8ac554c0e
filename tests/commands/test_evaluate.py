"""`rlhf eval`: its figures, the sources it takes, and what it refuses before weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.commands.evaluate import Request, evaluation_config, measure
from rlhf.commands.model_source import Source, find_source
from rlhf.commands.paths import located
from rlhf.config.section import ConfigError
from tests.support import group, train

RIGHT = """
def has_a(completions, **_):
    return [float("a" in text) for text in completions]
"""


def test_a_checkpoint_its_run_and_its_export_are_measured_alike(finished_run: Path, tmp_path: Path, capsys):
    checkpoint = finished_run / "checkpoints" / "step_000002"
    model = [str(finished_run / "model"), "--config", str(finished_run / "config.yaml")]
    data = ["--data", str(finished_run.parent / "train.jsonl")]
    reports: list[dict[str, Any]] = []
    for i, source in enumerate(([str(finished_run)], [str(checkpoint)], [*model, *data])):
        out = tmp_path / f"{i}.json"
        assert main(["eval", *source, "--out", str(out)]) == 0, capsys.readouterr().err
        reports.append(json.loads(out.read_text()))
    texts = [[c["text"] for r in report["records"] for c in r["completions"]] for report in reports]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 6 * 4
    assert reports[0]["weights"] == str(checkpoint)
    said = capsys.readouterr().out
    assert "6 prompts x 4 samples" in said and "pass@4" in said and "6 prompts are few" in said


def test_another_engine_greedy_takes_one_sample_and_agrees(finished_run: Path, tmp_path: Path, capsys):
    texts: list[list[str]] = []
    (tmp_path / "my.py").write_text(
        "def judge(cs):\n    return [[{'success': i > 0}] for i, _ in enumerate(cs)]"
    )
    for engine in ("native", "hf"):
        out = tmp_path / f"{engine}.json"
        greedy = ["--greedy", "--goals", f"{tmp_path}/my.py:judge", "--out", str(out)]
        assert main(["eval", str(finished_run), *greedy, f"rollout.engine={engine}"]) == 0
        report = json.loads(out.read_text())
        assert report["samples"] == 1
        # a judge that takes the first of six conversations for a failure
        assert "5 of 6 reached: GSR 83.3%" in capsys.readouterr().out
        assert report["goals"]["conversations"][0] == [
            {"first": 1, "last": 1, "success": False, "code": None}
        ]
        texts.append([r["completions"][0]["text"] for r in report["records"]])
    assert texts[0] == texts[1]


FAR = """
import copy
import torch
from rlhf.rollout.hf import HFEngine

class Far(HFEngine):
    def __init__(self, model, *, eos_token_ids):
        super().__init__(copy.deepcopy(model), eos_token_ids=eos_token_ids)
        with torch.no_grad():
            for weight in self._model.parameters():
                weight.zero_()
"""


def test_an_engine_with_weights_of_its_own_is_sent_those_of_the_checkpoint(
    finished_run: Path, tmp_path: Path
):
    (tmp_path / "engine.py").write_text(FAR)
    texts: list[list[str]] = []
    for engine in ("hf", f"{tmp_path}/engine.py:Far"):
        out = tmp_path / f"{len(texts)}.json"
        assert (
            main(["eval", str(finished_run), "--greedy", "--out", str(out), f"rollout.engine={engine}"]) == 0
        )
        texts.append([r["completions"][0]["text"] for r in json.loads(out.read_text())["records"]])
    assert texts[0] == texts[1]


def test_a_plain_model_needs_data_and_a_reward_alone(tiny_model_dir: Path, tmp_path: Path, capsys):
    (tmp_path / "reward.py").write_text(RIGHT)
    (tmp_path / "data.jsonl").write_text('{"prompt": "say a:"}\n{"prompt": "say b:"}\n')
    command = ["eval", str(tiny_model_dir), "--data", f"{tmp_path}/data.jsonl", "--reward"]
    command += [f"{tmp_path}/reward.py:has_a", "--k", "1,2", "eval.samples=2"]
    command += ["rollout.max_completion_tokens=4", "model.dtype=float32", "data.max_prompt_tokens=64"]
    assert main(command) == 0, capsys.readouterr().err
    assert "pass@2" in capsys.readouterr().out


def test_the_figures_by_hand():
    config = evaluation_config(
        Request("m", data="d.jsonl", rewards=("r.py:f",), overrides=("eval.samples=4",)),
        Source("m", None, None),
    )
    groups = [
        group("a", [1], [[5], [6], [7], [8]], [1.0, 1.0, 1.0, 1.0]),
        group("b", [1], [[5, 6], [6, 7], [7, 8], [8, 9]], [0.0, 0.0, 1.0, None]),
    ]
    measured = measure(groups, config, [1, 2], Source("m", None, None))
    assert measured.accuracy.value == (1.0 + 0.25) / 2
    # of 4 samples with 1 correct, two drawn ones miss it in 3 of 6 cases
    assert measured.pass_at[2].value == (1.0 + 0.5) / 2
    assert measured.reward == 5 / 7 and measured.unscored == 1
    assert measured.mean_tokens == 1.5 and measured.truncated == 0.0


def test_the_judge_of_a_run_has_no_part_in_an_evaluation():
    given = ("reward.preference.path=my_judge.py:shorter", "eval.samples=4")
    config = evaluation_config(
        Request("m", data="d.jsonl", rewards=("r.py:f",), overrides=given), Source("m", None, None)
    )
    assert config.reward.preference is None and config.reward.functions[0].path == "r.py:f"
    with pytest.raises(ConfigError, match="no reward function says what is correct"):
        evaluation_config(Request("m", data="d.jsonl", overrides=given), Source("m", None, None))


def test_the_samplers_of_a_run_have_no_part_in_an_evaluation():
    given = ("rollout.samplers=[{source: policy, n: 1}, {source: iterate, n: 3}]",)
    config = evaluation_config(
        Request("m", data="d.jsonl", rewards=("r.py:f",), overrides=given), Source("m", None, None)
    )
    assert not config.rollout.samplers and config.rollout.group_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--k", "8"], "pass@8 needs at least 8 samples of each prompt, but eval.samples is 4"),
        (["RUN", "--out", "TAKEN"], "exists already"),
        (["RUN", "model=./nowhere"], "there is no model folder nowhere"),
        (["RUN", "rollout.group_sise=3"], "did you mean rollout.group_size"),
        (["RUN", "--reward", "nowhere.py:f"], "nowhere.py"),
        (["RUN", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["MODEL"], "nothing to evaluate on"),
        (["MODEL", "--data", "x.jsonl"], "no reward function says what is correct"),
        (["./nowhere"], "there is no model folder"),
        (["RUN", "--revise", "2"], "nothing says in which words"),
        (["RUN", "--revise", "-1", "data.improve_prompt=x"], "0 or more, got -1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_weights_are_loaded(
    finished_run: Path, tiny_model_dir: Path, tmp_path: Path, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    (tmp_path / "taken.json").write_text("{}")
    names = {"RUN": finished_run, "MODEL": tiny_model_dir, "TAKEN": tmp_path / "taken.json"}
    assert main(["eval", *(str(names.get(a, a)) for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlhf eval: ") and message in said, said
    assert (tmp_path / "taken.json").read_text() == "{}"


def test_a_run_without_a_checkpoint_and_a_lone_adapter_are_named(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")
    with pytest.raises(RuntimeError, match="without a complete checkpoint"):
        find_source(str(tmp_path / "run"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA adapter only"):
        find_source(str(tmp_path / "adapter"))


def test_options_may_stand_between_settings(finished_run: Path, capsys):
    assert main(["eval", str(finished_run), "eval.samples=2", "--k", "1", "eval.max_prompts=2"]) == 0
    assert "2 prompts x 2 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", str(finished_run), "--grredy"])
    assert "--grredy" in capsys.readouterr().err


def test_paths_of_a_run_are_found_from_any_folder(tmp_path: Path):
    for name in ("model", "org/name", "native"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("held.jsonl", "reward.py"):
        (tmp_path / name).write_text("")
    settings = {
        "model": {"path": "./model", "dtype": "auto", "reference": "org/name", "lora": None},
        "data": {"eval": "held.jsonl", "train": "gone.jsonl", "max_prompt_tokens": 7},
        "reward": [{"path": "reward.py:right"}, {"path": "reward_model", "params": {"model": "/abs/model"}}],
        "engine": "native",
    }
    assert located(settings, tmp_path) == {
        "model": {
            "path": f"{tmp_path}/model", "dtype": "auto", "reference": f"{tmp_path}/org/name", "lora": None
        },
        "data": {"eval": f"{tmp_path}/held.jsonl", "train": "gone.jsonl", "max_prompt_tokens": 7},
        "reward": [
            {"path": f"{tmp_path}/reward.py:right"},
            {"path": "reward_model", "params": {"model": "/abs/model"}},
        ],
        "engine": "native",
    }  # fmt: skip
    assert located(settings, None) == settings


def test_a_run_on_data_is_evaluated_and_exported_in_another_folder_with_its_warnings(
    tmp_path: Path, tiny_model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def longest(completions, **_):\n    top = max(len(str(c)) for c in completions)\n"
        "    return [float(len(str(c)) == top) for c in completions]\n"
    )
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"conversations": chat}) + "\n") * 2)
    settings = {
        "run_dir": "runs/a", "steps": 1, "model": {"path": "./model", "dtype": "float32"},
        "data": {"train": "chats.jsonl", "eval": "chats.jsonl", "mode": "offline", "max_prompt_tokens": 32},
        "reward": {"functions": [{"path": "reward.py:longest"}]}, "algorithm": "sft",
        "rollout": {"prompts_per_step": 2, "group_size": 1, "max_completion_tokens": 4},
        "learner": {"microbatch_tokens": 64}, "checkpoint": {"export": False}, "monitor": {"sinks": []},
        "eval": {"samples": 1},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    train(settings)
    monkeypatch.chdir("/")
    run = str(tmp_path / "runs" / "a")
    assert main(["eval", run]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "warning      reward function longest seems to compare samples" in said
    assert "chats.jsonl has whole chats (column conversations): answers are sampled to" in said
    assert main(["export", run, str(tmp_path / "out")]) == 0, capsys.readouterr().err
