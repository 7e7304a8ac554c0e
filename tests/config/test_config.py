"""Settings: every key is known, every mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.config.algorithm import resolve_algorithm
from rlhf.config.errors import setting_names
from rlhf.config.foreign.names import MEANT, OTHER_NAMES
from rlhf.config.load import load_config, load_task, make_config
from rlhf.config.overrides import load_yaml
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.config.section import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run_dir": "runs/x",
        "steps": 10,
        "model": {"path": "m"},
        "data": {"train": "train.jsonl"},
        "reward": {"functions": [{"path": "a:b"}]},
        "algorithm": {"name": "grpo"},
    }
    return base | changes


def test_adding_a_setting_is_a_deliberate_edit_of_this_list():
    assert sorted(setting_names(Config)) == [
        "algorithm",
        "budget.advantage_clip",
        "budget.cost",
        "budget.high",
        "budget.low",
        "budget.prior",
        "budget.probes",
        "budget.rule",
        "checkpoint.background",
        "checkpoint.every",
        "checkpoint.export",
        "checkpoint.keep_best",
        "checkpoint.keep_last",
        "checkpoint.resume",
        "critic.eps",
        "critic.lr",
        "critic.path",
        "critic.trunk",
        "data.chat_template_kwargs",
        "data.completion_column",
        "data.curriculum",
        "data.eval",
        "data.image_column",
        "data.improve_column",
        "data.improve_prompt",
        "data.long_prompts",
        "data.max_prompt_tokens",
        "data.mix",
        "data.mode",
        "data.offline_steps",
        "data.precompute_reference",
        "data.prompt_column",
        "data.reference_column",
        "data.reward_column",
        "data.sampling",
        "data.together_column",
        "data.train",
        "distributed.mode",
        "distributed.shard_ranks",
        "distributed.timeout",
        "environment.calls",
        "environment.isolation",
        "environment.max_turns",
        "environment.memory_gib",
        "environment.params",
        "environment.path",
        "environment.timeout",
        "environment.variables",
        "environment.workers",
        "eval.every",
        "eval.max_prompts",
        "eval.samples",
        "iteration.mix",
        "iteration.reference",
        "iteration.steps",
        "learner.betas",
        "learner.epochs",
        "learner.eps",
        "learner.final_lr_share",
        "learner.lr",
        "learner.max_grad_norm",
        "learner.microbatch_tokens",
        "learner.minibatches",
        "learner.schedule",
        "learner.warmup_steps",
        "learner.weight_decay",
        "model.dtype",
        "model.gradient_checkpointing",
        "model.lora.alpha",
        "model.lora.dropout",
        "model.lora.rank",
        "model.lora.targets",
        "model.packing",
        "model.path",
        "model.reference",
        "model.trust_remote_code",
        "monitor.name",
        "monitor.project",
        "monitor.samples_per_step",
        "monitor.sinks",
        "pairs.labels",
        "pairs.length_penalty",
        "pairs.min_gap",
        "pairs.rule",
        "pairs.truncated",
        "perception.coef",
        "perception.entropy_coef",
        "perception.estimator",
        "perception.final_share",
        "perception.gradient",
        "perception.masked_entropy_coef",
        "perception.max_kl",
        "perception.patch",
        "perception.ratio",
        "perception.stop_at_signs",
        "perception.watch_steps",
        "prompt_value.epochs",
        "prompt_value.lr",
        "prompt_value.max_prompts",
        "prompt_value.max_value",
        "prompt_value.targets",
        "ptx.coef",
        "ptx.kind",
        "ptx.path",
        "ptx.samples",
        "replay.groups_per_step",
        "replay.max_age",
        "reward.constraints",
        "reward.functions",
        "reward.max_failed_share",
        "reward.preference.batch",
        "reward.preference.both_orders",
        "reward.preference.cache",
        "reward.preference.concurrency",
        "reward.preference.gpu",
        "reward.preference.memory_gib",
        "reward.preference.name",
        "reward.preference.params",
        "reward.preference.path",
        "reward.preference.processes",
        "reward.preference.timeout",
        "reward.preference.variables",
        "reward.preference.workers",
        "reward.special_tokens",
        "reward.success_objective",
        "reward.success_threshold",
        "rollout.ahead",
        "rollout.engine",
        "rollout.group_size",
        "rollout.kv_cache_gib",
        "rollout.max_completion_tokens",
        "rollout.min_p",
        "rollout.prompts_per_step",
        "rollout.samplers",
        "rollout.stop_token_ids",
        "rollout.sync_tolerance",
        "rollout.temperature",
        "rollout.top_k",
        "rollout.top_p",
        "rollout.vllm.args",
        "rollout.vllm.deadline",
        "rollout.vllm.lora",
        "rollout.vllm.replicas",
        "rollout.vllm.transport",
        "rollout.vllm.urls",
        "run_dir",
        "seed",
        "steps",
        "task",
        "tree.actions",
        "tree.delimiter",
        "tree.depth",
        "tree.end_marker",
        "tree.evaluator",
        "tree.exploration",
        "tree.gold_column",
        "tree.iterations",
        "tree.max_overlap",
        "tree.min_best",
        "tree.min_gap",
        "tree.prompts",
        "tree.rollouts",
        "tree.step_parts",
        "tree.step_tokens",
        "tree.temperature",
    ]


def test_adding_a_setting_of_an_algorithm_is_a_deliberate_edit_of_this_list():
    keys = {key for name in ALGORITHMS for key in resolve_algorithm(minimal(name), max_tokens=64)} - {"name"}
    assert sorted(keys) == [
        "advantage_clip",
        "alpha",
        "baseline",
        "beta",
        "clip",
        "clip_dual",
        "clip_high",
        "clip_low",
        "critic",
        "delta",
        "desirable_weight",
        "divergence",
        "drop_truncated",
        "earlier_weight",
        "entropy_coef",
        "eta",
        "floor",
        "gamma",
        "imitation_coef",
        "interval",
        "kl",
        "label_smoothing",
        "lam",
        "lr_ratio",
        "max_reward",
        "max_tokens",
        "max_weight",
        "mismatch",
        "mix",
        "negative",
        "nll_coef",
        "normalize",
        "one_sided",
        "overlong_cache",
        "penalty",
        "per_token",
        "positive",
        "ratio_penalty",
        "refill",
        "reward_scaling",
        "standardize",
        "tau",
        "tau_negative",
        "tau_positive",
        "temperature",
        "tool_coef",
        "tool_objectives",
        "undesirable_weight",
        "use_reference",
        "whiten",
    ]


def minimal(name: str) -> dict[str, Any]:
    required: dict[str, Any] = {"cispo": {"clip_high": 5.0}, "dtpo": {"tool_objectives": ["tool"]}}
    return {"name": name} | required.get(name, {})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path):
    config = load_task(str(path))
    if isinstance(config, Config):
        assert config.build_algorithm() is not None
    assert len(path.read_text().splitlines()) <= 30


@pytest.mark.parametrize("name", ALGORITHMS)
def test_picking_a_name_is_picking_the_algorithm(name: str):
    iteration = {"steps": 5 if name in ("sppo", "dno", "inpo", "spac") else 0}
    # only a teacher has to be named beside it
    model: dict[str, Any] = {"path": "m"} | ({"reference": "teacher"} if name == "distill" else {})
    if name == "ofs_dpo":
        model["lora"] = {"rank": 8}
    changes: dict[str, Any] = {"iteration": iteration, "model": model}
    data = {"train": "train.jsonl"} | ({"improve_prompt": "Better?"} if name == "srpo" else {})
    make_config(settings(algorithm=minimal(name), data=data, **changes)).build_algorithm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"group_sise": 4}},
            "unknown setting rollout.group_sise; did you mean rollout.group_size?",
        ),
        ({"learning_rate": 1e-5}, "unknown setting learning_rate; did you mean learner.lr?"),
        ({"lr": 1e-5}, "did you mean learner.lr?"),
        ({"rollout": {"n": 4}}, "did you mean rollout.group_size?"),
        ({"kl_coef": 0.1}, "did you mean algorithm.kl.coef?"),
        ({"algorithm": {"name": "grpo", "beta": 0.1}}, "did you mean algorithm.kl.coef?"),
        ({"learner": {"beta": 0.1}}, "did you mean learner.betas?"),
        (
            {"path": "m"},
            "did you mean model.path or reward.preference.path or environment.path or critic.path or "
            "ptx.path?",
        ),
        (
            {"algorithm": {"name": "grpo", "tau_positive": 1}},
            "unknown setting algorithm.tau_positive, which is one of sapo",
        ),
        ({"algorithm": {"name": "sapo", "clip_hi": 1}}, "unknown setting algorithm.clip_hi"),
        ({"steps": "many"}, "steps: must be a whole number, got 'many'"),
        ({"steps": 1.5}, "steps: must be a whole number, got 1.5"),
        ({"rollout": 8}, "rollout: must be a section, with settings of engine, prompts_per_step"),
        ({"rollout": None}, "rollout: must be a section, with settings of engine"),
        (
            {"budget": {"rule": "knapsak"}},
            "must be 'uniform' or 'knapsack' (did you mean knapsack?), got 'knapsak'",
        ),
        ({"budget": {"prior": "some"}}, "budget.prior: must be a number, got 'some'"),
        ({"checkpoint": {"export": "maybe"}}, "checkpoint.export: must be true or false, got 'maybe'"),
        ({"run_dir": 8}, "run_dir: must be text, got 8"),
        ({"rollout": {"stop_token_ids": 2}}, "rollout.stop_token_ids: must be a list, got 2"),
        ({"rollout": {"top_p": 2}}, "rollout.top_p: must be 1 or less, got 2"),
        (
            {"reward": {"functions": [{"path": "a:b", "batch": "all"}]}},
            "functions.0.batch: must be a whole number or be 'group' or 'step', got 'all'",
        ),
        ({"task": "reward_model"}, "rlhf train CONFIG trains it"),
        ({"group_size": 4}, "did you mean rollout.group_size?"),
        ({"algorithm": {"name": "grpo", "clip_hgh": 0.3}}, "did you mean algorithm.clip_high?"),
        ({"algorithm": {"name": "grpo", "kl": {"coeff": 0.3}}}, "did you mean algorithm.kl.coef?"),
        ({"algorithm": {"name": "grpp"}}, "unknown algorithm 'grpp'; did you mean grpo?"),
        ({"algorithm": {"name": "cispo"}}, "algorithm.clip_high is required"),
        ({"algorithm": {}}, "needs a name, one of grpo"),
        ({"algorithm": {"name": "grpo", "kl": {"coef": 0.1, "estimator": "k1"}}}, "k1"),
        ({"steps": 0}, "steps: must be 1 or more, got 0"),
        ({"learner": {"lr": -1.0}}, "learner.lr"),
        (
            {"learner": {"final_lr_share": 0.1}},
            "final_lr_share is 0.1, where a linear or",
        ),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature"),
        ({"rollout": {"engine": "vlm"}}, "rollout.engine"),
        ({"rollout": {"max_completion_tokens": 99_999}}, "= 101023 tokens"),
        ({"learner": {"minibatches": 99}}, "rollout.prompts_per_step = 32"),
        ({"learner": {"warmup_steps": 11}}, "the run has 10 steps"),
        ({"eval": {"every": 5}}, "there is no data.eval"),
        ({"budget": {"rule": "knapsack", "low": 9}}, "budget.low = 9"),
        ({"reward": {"functions": []}}, "reward.functions"),
        ({"model": {}}, "model.path is required"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        make_config(settings(**changes))
    assert message in str(error.value)


def test_a_name_alone_is_an_algorithm_with_its_defaults(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings(algorithm={"name": "grpo", "clip_low": 0.1})))
    assert (
        load_config(path, ["algorithm=rloo"]).algorithm == make_config(settings(algorithm="rloo")).algorithm
    )
    changed = load_config(path, ["algorithm=rloo", "algorithm.kl.coef=0"]).algorithm["kl"]
    assert changed == KL(coef=0.0, estimator="k1", placement="reward")


def test_every_name_of_another_framework_leads_to_a_setting():
    known = {
        *setting_names(Config),
        *setting_names(RewardModelConfig),
        "algorithm.name",
        "model.lora.rank",
        "model.lora.alpha",
    }
    known |= {f"algorithm.{key}" for key in ("clip_low", "clip_high", "clip_dual", "entropy_coef")}
    known |= {f"algorithm.kl.{key}" for key in ("coef", "estimator")}
    known |= {f"algorithm.critic.{key}" for key in ("value_clip", "coef", "gamma", "lam")}
    assert {part for ours in OTHER_NAMES for part in ours.split(" and ")} <= known
    assert len(MEANT) == sum(map(len, OTHER_NAMES.values())), "one name twice"


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings()) + "rollout:\n  group_size: 4\n  group_size: 8\n")
    with pytest.raises(
        ConfigError, match=r"group_size is given a second time \(it was in line 13\) in line 14"
    ):
        load_config(path)
    path.write_text("steps: 3\n\tseed: 1\n")
    with pytest.raises(ConfigError, match="indent with spaces"):
        load_config(path)


def test_a_number_with_an_exponent_is_a_number_wherever_it_stands():
    assert load_yaml("{a: 1e-5, b: [-2E+3, .5e1], c: 1e5x, d: '1e5'}") == {
        "a": 1e-5,
        "b": [-2000.0, 5.0],
        "c": "1e5x",
        "d": "1e5",
    }


def test_one_kl_setting_changes_and_the_algorithms_others_stay():
    config = make_config(settings(algorithm={"name": "rloo", "kl": {"coef": 0.01}}))
    assert config.algorithm["kl"] == KL(coef=0.01, estimator="k1", placement="reward")


def test_overrides_reach_every_level(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings()))
    config = load_config(
        path, ["steps=3", "learner.lr=1e-6", "algorithm.kl.coef=0", "rollout.stop_token_ids=[5]"]
    )
    assert (config.steps, config.learner.lr, config.rollout.stop_token_ids) == (3, 1e-6, (5,))
    assert config.algorithm["kl"] == KL(coef=0.0)


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings()))
    with pytest.raises(ConfigError):
        load_config(path, [override])


def test_a_missing_or_malformed_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(tmp_path / "nowhere.yaml")
    for text in ("[1, 2]", "a: [", ""):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load_config(tmp_path / "c.yaml")


def test_the_resolved_config_comes_back_from_its_own_yaml(tmp_path: Path):
    config = make_config(settings(algorithm={"name": "dapo"}))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml") == config


def test_an_algorithm_of_a_users_file_is_configured_like_the_others(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlhf.algos.algorithm import NO_KL\nfrom rlhf.algos.table import grpo\n\n"
        "def mine(*, strength: float = 0.5):\n    return grpo(clip_high=strength, kl=NO_KL)\n"
    )
    config = make_config(settings(algorithm={"name": f"{file}:mine", "strength": 0.3}))
    assert not config.build_algorithm().needs_reference
    with pytest.raises(ConfigError, match=r"did you mean algorithm\.strength"):
        make_config(settings(algorithm={"name": f"{file}:mine", "strenght": 0.3}))
