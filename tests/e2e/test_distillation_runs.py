"""Whole runs of `distill`: without rewards, from data, both together with an adapter; and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.models.sizes import model_sizes
from rlhf.monitoring.health import HealthWatch
from rlhf.preflight.describe import describe, warnings
from rlhf.preflight.estimate import GIB, estimate
from rlhf.preflight.load import load_inputs
from rlhf.preflight.machine import Machine
from tests.faults.processes import launch
from tests.support import bandit_settings, changed, metrics_of, train, train_interrupted, without_clocks

Folder = Callable[[str], Path]


def settings(folder: Path, student: Path, teacher: Path, **changes: Any) -> dict[str, Any]:
    base = bandit_settings(folder, student)
    base |= {"steps": 6, "algorithm": "distill", "reward": {}}
    base["model"]["reference"] = str(teacher)
    base["rollout"] |= {"group_size": 1, "max_completion_tokens": 10}
    return changed(base, changes)


def write_data(folder: Path) -> None:
    """A completion of each prompt, without a reward."""
    rows = [{"prompt": f"say {i}:", "completion": "abcdefgh"[i % 5 :]} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def teacher(tiny_model: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 hidden sizes, where the tiny student has 32, which prefers some tokens everywhere."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(tiny_model("llama-wide"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    # a first coordinate so large that the last norm makes it about 8, the root of 64, at every token
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 1.0
    head = embedding.clone()
    head[:, 0] = 0.25 * torch.randn(len(head), generator=torch.Generator().manual_seed(1))
    weights["lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# what changes against a run of 6 steps with the reverse KL on completions of the policy
HOW: dict[str, dict[str, Any]] = {
    "online": {},
    "offline": {"data": {"mode": "offline", "reward_column": None}},
    "both": {
        "data": {"mode": "offline_to_online", "mix": True, "reward_column": None},
        "algorithm": {"name": "distill", "kl": {"forward": 0.5}},
        "model": {"lora": {"rank": 8}},
    },
}


@pytest.mark.parametrize("how", HOW)
def test_a_student_comes_close_to_a_wider_teacher_without_rewards(
    tmp_path: Path, tiny_model: Folder, teacher: Path, how: str
) -> None:
    if how == "both":
        pytest.importorskip("peft")
    # an adapter leaves the head as it is: with this one a distribution depends on the layers
    student = tiny_model("llama-sharp" if how == "both" else "llama")
    made = settings(tmp_path, student, teacher, **HOW[how])
    if how != "online":
        write_data(tmp_path)
    train(made)
    steps = metrics_of(tmp_path)
    assert steps[-1]["kl/exact"] < steps[0]["kl/exact"] / 2
    assert ("kl/forward" in steps[0]) == (how == "both")
    assert not any(name.startswith("advantage/") for name in steps[0])
    assert ("reward/mean" in steps[0]) == (how == "offline")
    watch = HealthWatch()
    assert [text for values in steps for text in watch.check(values)] == []


def two_teachers(folder: Path, tiny_model: Folder, teacher: Path, **changes: Any) -> dict[str, Any]:
    """Two updates a step, in which the groups of both teachers and replayed ones are mixed."""
    folder.mkdir(exist_ok=True)
    made = settings(
        folder,
        tiny_model("llama"),
        teacher,
        **{
            "steps": 2,
            "model": {"reference": {"math": str(teacher), "chat": str(tiny_model("qwen2"))}},
            "rollout": {"prompts_per_step": 6, "max_completion_tokens": 6},
            "learner": {"minibatches": 2, "microbatch_tokens": 64},
            "replay": {"groups_per_step": 2},
            "checkpoint": {"every": 0, "export": False, "resume": "auto"},
        }
        | changes,
    )
    rows = [{"prompt": f"say {i}:", "teacher": "chat" if i % 3 else "math"} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


KLS = ("kl/exact", "kl/exact/math", "kl/exact/chat", "grad_norm")


@pytest.mark.multi
def test_two_teachers_of_one_run_whole_sharded_and_resumed_within_a_step(
    tmp_path: Path, tiny_model: Folder, teacher: Path
) -> None:
    runs: dict[str, list[dict[str, Any]]] = {}
    for ranks, mode in ((1, "replicated"), (2, "sharded")):
        made = two_teachers(tmp_path / mode, tiny_model, teacher, distributed={"mode": mode})
        for ended in launch(made, tmp_path / mode / "log", ranks=ranks):
            assert ended.code == 0, ended.said
        runs[mode] = metrics_of(tmp_path / mode)
    straight = runs["replicated"]
    for alone, both in zip(straight, runs["sharded"], strict=True):
        for name in KLS:
            assert both[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-5), (alone["step"], name)
    made = two_teachers(tmp_path / "again", tiny_model, teacher)
    train_interrupted(made, after=3)
    saved = tmp_path / "again" / "run" / "checkpoints"
    assert [file.name for file in saved.glob("step_*")] == ["step_000001"]
    train(made)
    assert without_clocks(metrics_of(tmp_path / "again")) == without_clocks(straight)


def test_the_check_says_who_teaches_and_counts_the_teachers_own_size(
    tmp_path: Path, tiny_model: Folder, teacher: Path
) -> None:
    config = make_config(settings(tmp_path, tiny_model("llama"), teacher))
    inputs = load_inputs(config)
    text = "\n".join(describe(config, inputs))
    assert f"reference    {teacher}, the teacher\n" in text
    assert "rewards      none: distill learns from the teacher alone\n" in text
    assert list(warnings(config, inputs)) == []
    machine = Machine("CPU", 8 * GIB, flops=1e11, bandwidth=1e10)
    found = estimate(config, inputs, world_size=1, machine=machine)
    (item,) = [item for item in found.memory if item.name == "reference"]
    student, sizes = (model_sizes(str(m), torch.float32) for m in (tiny_model("llama"), teacher))
    assert item.bytes == 4 * sizes.weights and sizes.weights > 2 * student.weights
    assert item.setting == "model.reference, a smaller teacher"
    alone = estimate(
        make_config(settings(tmp_path, tiny_model("llama"), tiny_model("qwen2"))),
        inputs,
        world_size=1,
        machine=machine,
    )
    assert found.seconds.learn > alone.seconds.learn


def test_the_check_counts_each_of_several_teachers_and_the_prompts_that_name_it(
    tmp_path: Path, tiny_model: Folder, teacher: Path
) -> None:
    made = two_teachers(tmp_path, tiny_model, teacher)
    small = made["model"]["reference"]["chat"]
    # a third name of a model that has one already takes no memory of its own
    made["model"]["reference"]["code"] = small
    config = make_config(made)
    inputs = load_inputs(config)
    text = "\n".join(describe(config, inputs))
    # 0, 3, ... 39 are math: 14 of 40
    each = f"math (14 prompts) {teacher}, chat (26 prompts) {small}, code (0 prompts) {small}"
    assert f"reference    by column teacher: {each}, the teachers\n" in text
    (warning,) = warnings(config, inputs)
    assert warning.startswith("model.reference.code is loaded, but no line of")
    machine = Machine("CPU", 8 * GIB, flops=1e11, bandwidth=1e10)
    found = estimate(config, inputs, world_size=1, machine=machine)
    held = [item.bytes for item in found.memory if item.name.startswith("reference")]
    assert held == [4 * model_sizes(path, torch.float32).weights for path in (str(teacher), small)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"reference_column": "teach"}},
            "no such column, only teacher; did you mean data",
        ),
        ({"model": {"reference": {"maths": "{t}", "chat": "{t}"}}}, "train.jsonl:1: column teacher is math"),
        ({"model": {"reference": {"math": "{t}", "chat": "./no"}}}, "there is no model folder no"),
    ],
)
def test_lines_that_name_no_teacher_and_teachers_that_are_not_there_are_refused(
    tmp_path: Path, tiny_model: Folder, changes: dict[str, Any], message: str
) -> None:
    small = tiny_model("qwen2")
    made = two_teachers(tmp_path, tiny_model, small)
    for section, values in changes.items():
        made[section] |= json.loads(json.dumps(values).replace("{t}", str(small)))
    with pytest.raises(ValueError, match=message):
        load_inputs(make_config(made))


def test_each_of_several_teachers_has_the_policys_tokens(
    tmp_path: Path, tiny_model: Folder, teacher: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model("qwen2"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    made = two_teachers(tmp_path, tiny_model, teacher)
    made["model"]["reference"]["chat"] = str(other)
    with pytest.raises(ConfigError, match=r"model\.reference\.chat, .*its head has 98 rows, the policy's 99"):
        load_inputs(make_config(made))


def test_a_teacher_with_other_tokens_is_refused_with_the_first_of_them(
    tmp_path: Path, tiny_model: Folder
) -> None:
    student, other = tiny_model("llama"), tmp_path / "other"
    shutil.copytree(student, other)
    file = other / "tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    # the tokens of a and b change places
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(written))
    first = min(vocabulary["a"], vocabulary["b"])
    message = (
        f"token {first} is 'a' in the policy's tokenizer, 'b' in the reference's; the vocabularies have 99 "
        r"tokens \(policy\) and 99 \(reference\)"
    )
    with pytest.raises(ConfigError, match=message):
        load_inputs(make_config(settings(tmp_path, student, other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 98}, "its head has 98 rows, the policy's 99"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is None in the policy and 30.0 in the"),
        ({"max_position_embeddings": 36}, "= 42, but model.reference, .* has positions for 36 tokens"),
    ],
)
def test_a_teacher_that_cannot_be_compared_is_refused(
    tmp_path: Path, tiny_model: Folder, change: dict[str, Any], message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        load_inputs(make_config(settings(tmp_path, tiny_model("llama"), other)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"reference": None}}, "model.reference is not given, but distill learns from a teacher"),
        ({"model": {"path": "m", "reference": "m"}}, "model.reference is the same model as model.path"),
        ({"iteration": {"steps": 2, "reference": "iterate"}}, "the policy would be its own teacher"),
        ({"budget": {"rule": "knapsack"}}, "budget.rule is knapsack, which shares out rollouts by rewards"),
        (
            {"data": {"mode": "offline", "sampling": "priority"}},
            "by their advantages, but distill has none",
        ),
        ({"data": {"eval": "held_out.jsonl"}}, "is evaluated by them: give some"),
        (
            {"model": {"path": "m", "reference": {"a": "m"}}},
            "model.reference is the same model as model.path",
        ),
        ({"model": {"reference": {}}}, "name a model, or several as"),
        (
            {
                "model": {"reference": {"a": "m", "b": "n"}},
                "data": {"mode": "offline", "precompute_reference": True},
                "algorithm": "dpo",
            },
            r"several models \(a, b\), but dpo compares pairs with a single one: give one path(.|\n)*"
            "data.precompute_reference is for a single one",
        ),
        (
            {
                "model": {"reference": {"a": "m", "b": "n"}},
                "rollout": {"samplers": [{"source": "reference", "n": 1}]},
            },
            "rollout.samplers has {source: reference}, which samples from a single one",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_teacher_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(settings(tmp_path, tmp_path / "student", tmp_path / "teacher", **changes))
