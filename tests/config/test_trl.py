"""What a setting or a loss of TRL's preference trainers is answered with."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.table import ALGORITHMS
from rlhf.config.errors import setting_names
from rlhf.config.foreign.names import MEANT
from rlhf.config.foreign.preferences import LOSS_TYPES, METHODS, RENAMED, REPLACED
from rlhf.config.load import make_config
from rlhf.config.run import Config
from rlhf.config.section import ConfigError

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "steps": 10,
    "model": {"path": "m"},
    "data": {"train": "train.jsonl", "mode": "offline"},
}


def message(algorithm: Any = "dpo", **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make_config(BASE | {"algorithm": algorithm} | changes)
    return str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "place", "key", "answer"),
    [
        ("dpo", None, "beta", "algorithm.beta"),
        ("dpo", "learner", "beta", "algorithm.beta"),
        ("dpo", "rollout", "label_smoothing", "algorithm.label_smoothing"),
        ("dpo", None, "per_token", "algorithm.per_token"),
        ("simpo", None, "gamma", "algorithm.gamma"),
        ("slic", None, "delta", "algorithm.delta"),
        ("dpop", None, "lam", "algorithm.lam"),
        ("ipo", "learner", "tau", "algorithm.tau"),
        ("kto", None, "desirable_weight", "algorithm.desirable_weight"),
        ("ipo", None, "beta", "algorithm.tau"),
        ("ipo", "algorithm", "beta", "algorithm.tau"),
        ("orpo", "algorithm", "beta", "algorithm.lam"),
        # those of other algorithms stay what they are
        ("grpo", None, "beta", "algorithm.kl.coef"),
        ("grpo", "learner", "beta", "learner.betas"),
        ("ppo", None, "gamma", "algorithm.critic.gamma"),
        ("grpo", None, "delta", "algorithm.clip_dual"),
        ("dpo", None, "kl", "algorithm.kl.coef"),
        ("dpo", None, "precompute_ref_log_probs", "data.precompute_reference"),
        ("dpo", None, "max_prompt_length", "data.max_prompt_tokens"),
        ("dpo", None, "max_completion_length", "rollout.max_completion_tokens"),
        ("dpo", None, "max_length", "data.max_prompt_tokens and rollout.max_completion_tokens"),
        ("dpo", None, "per_device_train_batch_size", "rollout.prompts_per_step"),
    ],
)
def test_a_setting_of_the_chosen_algorithm_comes_before_that_of_another(
    algorithm: str, place: str | None, key: str, answer: str
):
    changes: dict[str, Any] = {key: 0.5} if place is None else {place: {key: 0.5}}
    said = message({"name": algorithm, key: 0.5}) if place == "algorithm" else message(algorithm, **changes)
    assert said.endswith(f"; did you mean {answer}?")


def test_a_setting_that_the_chosen_algorithm_lacks_names_those_that_have_it():
    assert message("ipo", label_smoothing=0.1).endswith(", which is one of dpo, robust_dpo, exo")


@pytest.mark.parametrize(("loss", "answer"), LOSS_TYPES.items())
def test_a_loss_type_is_answered_wherever_it_stands(loss: str, answer: str):
    for said in (
        message(loss_type=loss),
        message(learner={"loss_type": [loss]}),
        message({"name": "dpo", "loss_type": loss}),
    ):
        assert re.fullmatch(
            rf"unknown setting (learner\.|algorithm\.)?loss_type; coming from TRL: {re.escape(answer)}", said
        )


@pytest.mark.parametrize(
    ("loss", "answer"),
    [
        (["sigmoid", "sft"], "algorithm.name=rpo"),
        (["sigmoid", "bco_pair"], "no other mixtures"),
        ("dapo", "algorithm.name=dapo"),
    ],
)
def test_mixtures_and_losses_of_the_same_name(loss: Any, answer: str):
    assert answer in message(loss_type=loss)


@pytest.mark.parametrize(
    ("name", "answer"), [item for item in (LOSS_TYPES | METHODS).items() if item[0] not in ALGORITHMS]
)
def test_another_name_of_a_method_is_answered_without_a_neighbour(name: str, answer: str):
    assert message(name) == f"unknown algorithm '{name}': {answer}"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("dpo_", "unknown algorithm 'dpo_': algorithm.name=dpo"),
        ("cDPO", "algorithm.name=dpo with algorithm.label_smoothing"),
        ("GRPP", "did you mean grpo?"),
    ],
)
def test_case_and_dashes_of_a_name_do_not_hide_the_algorithm(name: str, answer: str):
    assert answer in message(name)


@pytest.mark.parametrize(("name", "algorithm"), [("DPO", "dpo"), ("Robust-DPO", "robust_dpo")])
def test_capitals_and_dashes_do_not_matter(name: str, algorithm: str):
    assert make_config(BASE | {"algorithm": name}).algorithm["name"] == algorithm


@pytest.mark.parametrize(("key", "answer"), REPLACED.items())
def test_every_other_setting_has_an_answer(key: str, answer: str):
    assert message(**{key: 1}) == f"unknown setting {key}; coming from TRL: {answer}"
    assert message({"name": "kto", key: 1}) == f"unknown setting algorithm.{key}; coming from TRL: {answer}"


def test_answers_name_only_settings_and_algorithms_that_exist():
    known = set(setting_names(Config)) | {"algorithm.name", "reward.functions", "reward.preference"}
    arguments = {key for f in PREFERENCE.values() for key in inspect.signature(f).parameters}
    for answer in (LOSS_TYPES | METHODS | REPLACED).values():
        for section, key in re.findall(r"\b(model|data|rollout|learner|reward|algorithm)\.(\w+)", answer):
            assert f"{section}.{key}" in known or (section == "algorithm" and key in arguments), answer
        for name in re.findall(r"algorithm\.name=(\w+)", answer):
            assert name in ALGORITHMS, answer
    assert not REPLACED.keys() & MEANT.keys(), "answered in two ways"
    assert all(new in inspect.signature(PREFERENCE[name]).parameters for (name, _), new in RENAMED.items())


def test_the_page_has_the_tables():
    page = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text()
    section = page.partition("## Coming from TRL")[2]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    shown = [(key, answer.replace("`", "")) for keys, answer in rows for key in re.findall(r"\w+", keys)]
    assert sorted(shown) == sorted([*LOSS_TYPES.items(), *REPLACED.items(), *METHODS.items()])
    named = re.findall(r"`(\w+)`\s`([\w.]+)`", section)
    assert len(named) >= 9
    for other, ours in named:
        assert ours in (f"algorithm.{other}", MEANT.get(other)), other
