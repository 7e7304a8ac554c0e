"""Whole runs on preference pairs: they learn, resume byte for byte, and any number of ranks does the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.trainer import Trainer
from tests.faults.processes import Fault, launch
from tests.support import bandit_settings, metrics_of, train, without_clocks

SAME = ("pairs/loss", "pairs/margin", "pairs/chosen_logratio", "entropy", "grad_norm")


def write_pairs(file: Path, *, seed: int, count: int) -> None:
    """Pairs of strings of seven letters, of which the one with more letters a is chosen."""
    rng = random.Random(seed)

    def text(share: float) -> str:
        return "".join("a" if rng.random() < share else rng.choice("bcdefgh") for _ in range(7))

    rows: list[dict[str, str]] = []
    while len(rows) < count:
        better, worse = text(0.8), text(0.2)
        if better.count("a") > worse.count("a"):
            rows.append({"prompt": f"say {len(rows)}:", "chosen": better, "rejected": worse})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a DPO run on 40 pairs with 12 held-out ones, and no reward function."""
    base = bandit_settings(folder, model)
    write_pairs(folder / "train.jsonl", seed=0, count=40)
    write_pairs(folder / "eval.jsonl", seed=1, count=12)
    base |= {"steps": 6, "algorithm": {"name": "dpo"}, "reward": {}}
    base["data"] |= {"mode": "offline", "eval": str(folder / "eval.jsonl")}
    base["learner"] |= {"lr": 3e-3, "eps": 1e-3}
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [record["pairs"] for record in json.loads((folder / "run" / "eval.json").read_text())]


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto", "apo_down"])
def test_a_run_learns_to_order_held_out_pairs(tmp_path: Path, tiny_model_dir: Path, name: str):
    train(settings(tmp_path, tiny_model_dir, algorithm={"name": name}, steps=12, learner={"eps": 1e-8}))
    first, last = evaluations(tmp_path)
    assert first["accuracy"] == 0.5 and first["margin"] == 0.0
    assert last["accuracy"] >= 0.9 and last["margin"] > 0
    steps = metrics_of(tmp_path)
    assert steps[-1]["pairs/loss"] < steps[0]["pairs/loss"]
    # no figure of rollouts or of advantages, which there are none of
    assert not [k for step in steps for k in step if k.startswith(("advantage/", "ratio/", "loss/", "kl/"))]


def test_a_model_learns_to_answer_and_to_improve_an_answer(tmp_path: Path, tiny_model_dir: Path):
    changes: dict[str, Any] = {"algorithm": {"name": "srpo"}, "data": {"improve_prompt": " Better: "}}
    train(settings(tmp_path, tiny_model_dir, steps=6, learner={"lr": 1e-3, "eps": 1e-8}, **changes))
    steps = metrics_of(tmp_path)
    # nothing is preferred yet: (1 - 1/2)^2, of a prompt's six sequences of which four have two answers
    assert steps[0]["pairs/loss"] == pytest.approx(0.25) and steps[0]["pairs/margin"] == 0.0
    assert steps[-1]["pairs/loss"] < 0.15 and steps[-1]["pairs/accuracy"] > 0.8
    # what is learned is an answer, wherever it stands
    assert steps[0]["pairs/chosen_tokens"] == 8.0
    assert evaluations(tmp_path)[-1]["accuracy"] > evaluations(tmp_path)[0]["accuracy"]
    made = settings(tmp_path, tiny_model_dir, **changes | {"data": {}})
    with pytest.raises(ConfigError, match=r"data\.improve_prompt is not set"):
        make_config(made)


def test_a_precomputed_reference_changes_nothing_and_is_given_up(tmp_path: Path, tiny_model_dir: Path):
    found: list[Any] = []
    for name, given_up in (("kept", False), ("computed", True)):
        folder = tmp_path / name
        folder.mkdir()
        data = {"precompute_reference": given_up}
        made = settings(folder, tiny_model_dir, data=data, steps=3)
        trainer = Trainer(make_config(made))
        trainer.run()
        reference = trainer.components.experience.models.reference
        assert reference is not None
        assert {p.is_meta for p in reference.model.parameters()} == {given_up}
        # a resumed run has the log-probs from its checkpoint
        train(made | {"steps": 5, "checkpoint": {"export": False, "resume": "auto"}})
        found.append(metrics_of(folder))
    for kept, computed in zip(*found, strict=True):
        for name in SAME:
            assert computed[name] == pytest.approx(kept[name], abs=2e-6), (kept["step"], name)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, tiny_model_dir: Path):
    files: list[tuple[str, str]] = []
    for name, fault in (("straight", None), ("killed", Fault("torch.autograd:backward", 7))):
        folder = tmp_path / name
        folder.mkdir()
        made = settings(
            folder,
            tiny_model_dir,
            # BCO has a running mean, and several microbatches make a step
            algorithm={"name": "bco"},
            learner={"microbatch_tokens": 64},
            rollout={"prompts_per_step": 4},
            checkpoint={"export": False, "every": 1, "resume": "auto"},
        )
        [ended] = launch(made, folder / "log", fault=fault)
        if fault is not None:
            assert ended.code == -9, ended.said
            [ended] = launch(made, folder / "again")
        assert ended.code == 0, ended.said
        steps = json.dumps(without_clocks(metrics_of(folder)))
        files.append((steps, (folder / "run" / "eval.json").read_text()))
    assert files[0] == files[1]


@pytest.mark.multi
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_ranks_whole_or_sharded_learn_what_one_does(tmp_path: Path, tiny_model_dir: Path, name: str):
    runs: list[list[dict[str, Any]]] = []
    for ranks, mode in ((1, "replicated"), (2, "replicated"), (2, "sharded")):
        folder = tmp_path / f"{ranks}{mode}"
        folder.mkdir()
        made = settings(folder, tiny_model_dir, algorithm={"name": name}, distributed={"mode": mode}, steps=3)
        for ended in launch(made, folder / "log", ranks=ranks):
            assert ended.code == 0, ended.said
        runs.append(metrics_of(folder) + evaluations(folder))
    one, *others = runs
    for other in others:
        for alone, together in zip(one[:3], other[:3], strict=True):
            for key in SAME:
                assert together[key] == pytest.approx(alone[key], abs=1e-5, rel=1e-4), (alone["step"], key)
        for alone, together in zip(one[3:], other[3:], strict=True):
            assert together["margin"] == pytest.approx(alone["margin"], abs=1e-4)
            assert together["accuracy"] == alone["accuracy"]


def test_check_speaks_of_pairs(tmp_path: Path, tiny_model_dir: Path):
    config = make_config(settings(tmp_path, tiny_model_dir))
    text = "\n".join(describe(config, load_inputs(config)))
    assert "held out     12 pairs" in text
    assert "sampling" not in text


def test_single_labels_need_a_method_that_takes_them(tmp_path: Path, tiny_model_dir: Path):
    made = settings(tmp_path, tiny_model_dir, data={"eval": None})
    rows = [{"prompt": "x", "completion": "aaa", "label": i % 2 == 0} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"train\.jsonl:1: dpo compares completions of one prompt"):
        load_inputs(make_config(made))
    load_inputs(make_config(made | {"algorithm": {"name": "kto"}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"mode": "online", "eval": None}, "rollout": {"group_size": 1}},
            "dpo compares completions of a prompt: it needs two or more",
        ),
        (
            {"data": {"mode": "offline_to_online", "mix": True}},
            "dpo would compare their labels .* with rewards: set data.reward_column to null",
        ),
        (
            {"learner": {"microbatch_tokens": 47}},
            "learner.microbatch_tokens is 47, but dpo needs the 2 completions .* up to 48 tokens",
        ),
        ({"algorithm": {"name": "grpo"}, "pairs": {"rule": "all"}}, "the section pairs is for preference"),
        ({"pairs": {"rule": "best"}}, "must be one of best_worst, .* got 'best'"),
        (
            {"data": {"precompute_reference": True}, "algorithm": {"name": "simpo"}},
            "simpo with these settings has no reference",
        ),
        (
            {"data": {"precompute_reference": True}, "algorithm": {"name": "kto"}},
            "does not work with kto, .* behind the prompt of another pair",
        ),
        (
            {"data": {"precompute_reference": True, "mode": "offline_to_online", "offline_steps": 2}},
            "precompute_reference is for data.mode = offline",
        ),
        (
            {
                "data": {"precompute_reference": True},
                "algorithm": {"kl": {"coef": 1.0, "estimator": "exact"}},
            },
            "algorithm.kl.estimator = exact compares the whole vocabulary",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_the_config_is_read(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_config(settings(tmp_path, tiny_model_dir, **changes))


def test_pairs_of_sampled_completions_teach_too(tmp_path: Path, tiny_model_dir: Path):
    """Online DPO: completions of the policy, paired by their reward."""
    made = bandit_settings(tmp_path, tiny_model_dir, algorithm={"name": "dpo"}, steps=15)
    train(made | {"pairs": {"rule": "best_worst"}})
    steps = metrics_of(tmp_path)
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"] + 0.1
    assert all(step["pairs/groups"] <= 8 for step in steps)


def test_an_adapter_is_its_own_reference_and_is_not_given_up(tmp_path: Path, tiny_model_dir: Path):
    pytest.importorskip("peft")
    made = settings(tmp_path, tiny_model_dir, data={"precompute_reference": True}, steps=3)
    made["model"]["lora"] = {"rank": 4}
    trainer = Trainer(make_config(made))
    trainer.run()
    assert not any(p.is_meta for p in trainer.components.policy.model.parameters())
    steps = metrics_of(tmp_path)
    assert steps[0]["pairs/margin"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1]["pairs/margin"] > 0
