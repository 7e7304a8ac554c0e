"""The command line: the plan of a run, or a message that says what is wrong."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from rlhf.cli import main
from tests.support import bandit_settings


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Path):
    def write(**changes: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(bandit_settings(tmp_path, tiny_model_dir, **changes)))
        return str(path)

    return write


def test_check_prints_the_plan_and_loads_no_weights(write, tiny_model_dir: Path, capsys, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained

    def no_weights(*place: Any, **how: Any) -> Any:
        # on this device tensors have shapes but no contents
        assert how["device_map"] == "meta"
        return load(*place, **how)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_weights)
    assert main(["check", write()]) == 0
    plan = capsys.readouterr().out
    assert "8 prompts x 8 = 64 completions of at most 8 tokens" in plan
    assert "none: no KL term, not loaded" in plan
    assert "2.4 passes over the data" in plan
    assert not (tiny_model_dir / "run").exists()


def test_check_says_what_each_of_several_ranks_needs(write, capsys):
    assert main(["check", write(), "--ranks", "4", "distributed.mode=sharded"]) == 0
    plan = capsys.readouterr().out
    assert "GiB a rank at the fullest moment" in plan and "WILL NOT FIT" not in plan
    assert "on 4 rank(s)" in plan and "each rank sends" in plan and "at least" in plan
    assert main(["check", write(), "--ranks=3", "distributed.mode=sharded", "distributed.shard_ranks=2"]) == 2
    assert "3 ranks cannot be dealt to groups" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_sise=4"], "did you mean rollout.group_size?"),
        (["model.path=./nowhere"], "there is no model folder"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.prompt_column=question"], "question"),
        (["data.max_prompt_tokens=4"], "4"),
        (["rollout.max_completion_tokens=500", "data.max_prompt_tokens=100"], "positions for 512 tokens"),
        (["rollout.top_p=0.9"], "set rollout.top_k too"),
        (["rollout.ahead=1", "algorithm.mismatch.kind=none"], "rollout.ahead"),
        (["reward.functions=[{path: 'nowhere:f'}]"], "nowhere"),
        (["reward.functions=[{path: 'rlhf.rewards.builtin:numeric_match'}]"], "answer"),
        (["reward.functions=[{path: 'rlhf.rewards.builtin:numeric_mach'}]"], "numeric_match"),
        (["reward.functions=[{path: './nowhere.py:f'}]"], "nowhere.py"),
        (["steps=many"], "steps"),
        (["algorithm.name=5"], "needs a name"),
        (["algorithm.clip_low=-3"], "clip_low"),
        (["algorithm={name: gdpo, kl: {coef: 0.1, estimator: k1, placement: reward}}"], "gdpo"),
        (["learner.betas=[0.9, 1.5]"], "learner.betas"),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_bad_input_is_a_sentence_before_weights_are_loaded(
    write, command: str, overrides: list[str], message: str, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert main([command, write(), *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlhf {command}: ") and message in said, said
    assert "Traceback" not in said


def test_a_run_is_not_overwritten(write, tmp_path: Path, capsys):
    config = write(steps=1)
    assert main(["train", config]) == 0
    assert main(["train", config]) == 2
    assert "already holds a run" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_a_reward_that_fails_stops_the_run_with_its_name(write, tmp_path: Path, capsys):
    config = write(steps=1)
    (tmp_path / "reward.py").write_text("def share_of_a(completions, **_):\n    raise KeyError('gold')\n")
    assert main(["train", config]) == 2
    said = capsys.readouterr().err
    assert "share_of_a" in said and "KeyError" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"success_objective": "nosuch"}, "data": {"eval": "train.jsonl"}}, "nosuch"),
        ({"rollout": {"kv_cache_gib": 1e-9}}, "kv_cache_gib"),
        ({"learner": {"lr": 1e30}}, "lower learner.lr"),
    ],
)
def test_what_shows_only_while_running_is_a_sentence_too(
    write, tmp_path: Path, changes: dict[str, Any], message: str, capsys
):
    if "data" in changes:
        changes = changes | {"data": {"eval": str(tmp_path / "train.jsonl")}}
    assert main(["train", write(steps=3, **changes)]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_held_out_set_without_the_column_is_named(write, tmp_path: Path, capsys):
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "with.jsonl").write_text('{"prompt": "x", "answer": 1}\n')
    overrides = [f"data.eval={tmp_path}/held_out.jsonl", f"data.train={tmp_path}/with.jsonl"]
    overrides += ["reward.functions=[{path: 'rlhf.rewards.builtin:numeric_match'}]"]
    assert main(["check", write(), *overrides]) == 2
    assert "held_out.jsonl" in capsys.readouterr().err


def test_resuming_with_another_model_is_refused(write, tiny_model, tmp_path: Path, capsys):
    config = write(steps=1)
    assert main(["train", config]) == 0
    other = [f"model.path={tiny_model('qwen3')}", "checkpoint.resume=auto", "steps=2"]
    assert main(["train", config, *other]) == 2
    assert "another model" in capsys.readouterr().err


def test_a_resumed_run_says_what_has_changed(write, capsys):
    config = write(steps=1)
    assert main(["train", config]) == 0
    again = [config, "checkpoint.resume=auto"]
    capsys.readouterr()
    assert main(["train", *again]) == 0
    said = capsys.readouterr().out
    assert "every step is done already" in said and "other settings" not in said
    assert main(["train", *again, "steps=2", "learner.lr=0.5", "rollout.group_size=4"]) == 0
    said = capsys.readouterr().out
    assert "other settings than before: rollout.group_size: 8 -> 4; learner.lr: " in said and "-> 0.5" in said
    assert main(["train", *again, "steps=3", "algorithm=ppo"]) == 2
    assert "the checkpoint has no critic" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"), [("grpo", True), ("rloo", True), ("reinforce_pp", False), ("ppo", False)]
)
def test_a_group_of_one_is_a_warning_where_completions_are_compared(write, capsys, name: str, told: bool):
    assert main(["check", write(), f"algorithm={name}", "rollout.group_size=1"]) == 0
    assert ("no reward is learned from" in capsys.readouterr().out) == told


def test_an_option_that_is_a_setting_is_refused_with_the_way_to_write_it(write, capsys):
    with pytest.raises(SystemExit):
        main(["train", write(), "--steps", "5"])
    assert "unrecognized arguments: --steps; a setting is key=value, as steps=5" in capsys.readouterr().err


def test_no_command_says_which_there_are(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "train" in capsys.readouterr().err


def test_the_package_is_the_command_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rlhf", "check", "nowhere.yaml"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("rlhf", run_name="__main__")
    assert "there is no config file nowhere.yaml" in capsys.readouterr().err


def test_check_says_what_counts_as_correct(write, tmp_path: Path, capsys):
    held_out = f"data.eval={tmp_path}/train.jsonl"
    assert main(["check", write(), held_out]) == 0
    assert "samples; correct where the reward is at least 0.5" in capsys.readouterr().out
    assert main(["check", write(), held_out, "reward.success_objective=a", "reward.success_threshold=1"]) == 0
    assert "samples; correct where a is at least 1" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["train", "c.yaml"], ["check", "c.yaml"], ["doctor"]])
def test_ctrl_c_before_a_run_has_begun_is_a_sentence(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.cli._run_command", pressed)
    assert main(command) == 130
    assert capsys.readouterr().err == f"rlhf {command[0]}: stopped at once; what was saved before is kept\n"
