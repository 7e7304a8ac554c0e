"""What settings of verl and TRL, and short forms of ours, are answered with or taken for."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.errors import setting_names
from rlhf.config.foreign import trl, verl
from rlhf.config.load import load_config, make_config
from rlhf.config.run import Config
from rlhf.config.section import ConfigError

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "steps": 10,
    "model": "org/model",
    "data": {"train": "train.jsonl"},
    "algorithm": "grpo",
    "reward": {"functions": ["f.py:score"]},
}
ANSWERS: list[tuple[str, Any, str]] = [
    # verl
    ("actor_rollout_ref.rollout.n", 5, "coming from verl: rollout.group_size=5"),
    ("actor_rollout_ref.rollout.name", "sglang", "rollout.engine=native; engines here are native, vllm, "),
    ("actor_rollout_ref.rollout.response_length", 2048, "rollout.max_completion_tokens=2048"),
    ("actor_rollout_ref.rollout.temperature", 0.7, "rollout.temperature=0.7"),
    ("actor_rollout_ref.rollout.top_k", -1, "rollout.top_k=0"),
    ("actor_rollout_ref.rollout.gpu_memory_utilization", 0.6, "vllm.args={gpu_memory_utilization: 0.6}"),
    ("actor_rollout_ref.rollout.tensor_model_parallel_size", 2, "an engine has one GPU"),
    ("actor_rollout_ref.rollout.val_kwargs.n", 4, "eval.samples=4"),
    ("actor_rollout_ref.rollout.multi_turn.enable", True, "environment.path"),
    ("actor_rollout_ref.rollout.no_such_thing", 1, "nothing here stands for it"),
    ("actor_rollout_ref.model.path", "a/b", "model.path=a/b"),
    ("actor_rollout_ref.model.lora_rank", 32, "model.lora.rank=32, model.lora.alpha=16"),
    ("actor_rollout_ref.model.enable_gradient_checkpointing", False, "model.gradient_checkpointing=false"),
    ("actor_rollout_ref.model.use_remove_padding", True, "nothing to set: sequences are packed"),
    ("actor_rollout_ref.actor.optim.lr", 3e-6, "learner.lr=3e-06"),
    ("actor_rollout_ref.actor.optim.lr_warmup_steps", 10, "learner.warmup_steps=10"),
    ("actor_rollout_ref.actor.ppo_mini_batch_size", 128, "learner.minibatches=8"),
    ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", 4, "learner.microbatch_tokens bounds"),
    ("actor_rollout_ref.actor.ppo_epochs", 2, "learner.epochs=2"),
    ("actor_rollout_ref.actor.use_kl_loss", True, "algorithm.kl.coef=0.001, algorithm.kl.estimator=k3"),
    ("actor_rollout_ref.actor.clip_ratio_high", 0.28, "algorithm.clip_high=0.28"),
    ("actor_rollout_ref.actor.loss_agg_mode", "seq-mean-token-mean", "dapo means over all tokens"),
    ("actor_rollout_ref.actor.entropy_coeff", 0.01, "algorithm.entropy_coef=0.01"),
    ("actor_rollout_ref.actor.fsdp_config.param_offload", True, "distributed.mode=sharded"),
    ("actor_rollout_ref.ref.fsdp_config.param_offload", True, "the reference is sharded"),
    ("algorithm.adv_estimator", "rloo", "algorithm.name=rloo"),
    ("algorithm.use_kl_in_reward", True, "algorithm.kl.placement=reward"),
    ("data.train_batch_size", 512, "rollout.prompts_per_step=512, learner.minibatches=2"),
    ("data.filter_overlong_prompts", True, "data.long_prompts=skip"),
    ("data.truncation", "left", "no prompt is cut"),
    ("trainer.total_epochs", 15, "steps = 15 x prompts / 1024"),
    ("trainer.n_gpus_per_node", 4, "distributed.mode=sharded"),
    ("trainer.logger", ["console", "wandb"], "monitor.sinks=[wandb]"),
    ("trainer.test_freq", 5, "eval.every=5"),
    ("trainer.resume_mode", "auto", "checkpoint.resume=auto"),
    ("custom_reward_function.path", "r.py", "reward.functions=[{path: r.py:compute_score}]"),
    # TRL
    ("scale_rewards", False, "coming from TRL: algorithm.name=dr_grpo"),
    ("importance_sampling_level", "sequence", "coming from TRL: algorithm.name=gspo"),
    ("reward_weights", [1.0, 0.5], "reward.functions: each has its weight"),
    ("mask_truncated_completions", True, "algorithm.drop_truncated, of dapo"),
    ("use_peft", True, "model.lora.rank"),
    ("lora_target_modules", ["q_proj"], "model.lora.targets"),
    ("logging_steps", 1, "every step is logged"),
    ("steps_per_generation", 4, "learner.minibatches"),
    ("vllm_server_base_url", "http://a", "rollout.vllm.urls"),
    ("push_to_hub", True, "rlhf export RUN FOLDER"),
    ("num_generations", 4, "rollout.group_size"),
    # neither, and no misleading neighbours
    ("deepspeed", "ds.json", "distributed.mode=sharded (FSDP2)"),
    ("model.load_in_4bit", True, "not here: weights are trained in full precision"),
    ("dpo", 1, "did you mean algorithm.name=dpo?"),
    ("fp16", True, "did you mean model.dtype?"),
    ("learning_rat", 1e-6, "did you mean learner.lr?"),
    ("quantum", 3, ""),
    ("zero_stage", 3, ""),
    ("tokenizer", "x", ""),
]


def message(key: str, value: Any) -> str:
    tree: dict[str, Any] = {}
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    merged = {k: BASE.get(k, {}) | v if isinstance(BASE.get(k), dict) else v for k, v in tree.items()}
    if "algorithm" in tree:
        merged["algorithm"] = {"name": "grpo"} | tree["algorithm"]
    if "model" in tree:
        merged["model"] = {"path": "m"} | tree["model"]
    with pytest.raises(ConfigError) as error:
        make_config(BASE | merged)
    return str(error.value)


@pytest.mark.parametrize(("key", "value", "expected"), ANSWERS)
def test_a_setting_of_another_framework_is_answered(key: str, value: Any, expected: str) -> None:
    said = message(key, value)
    if expected:
        assert said.startswith(f"unknown setting {key}; ") and expected in said
    else:
        assert said == f"unknown setting {key}"


def test_answers_name_settings_that_exist() -> None:
    known = {*setting_names(Config), "model.lora.rank"}
    for convert in (verl.convert, trl.convert):
        found = {key for key in convert({}).settings if not key.startswith("algorithm.")}
        assert found <= known
    assert {name for name in verl.SAME.values() if not name.startswith("algorithm.")} <= known
    assert {*trl.SAME.values(), *trl.SAMPLING.values()} <= known


def test_short_forms_are_taken_for_what_they_mean(tmp_path: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("run_dir: r\nsteps: 1\nmodel: org/model\ndata: {train: t.jsonl}\nalgorithm: Dr-GRPO\n")
    short = ["reward.functions=[f.py:g, numeric_match]", "checkpoint.resume=true", "model.lora=true"]
    config = load_config(file, [*short, "model.packing=padded"])
    assert config.model.path == "org/model" and config.model.packing == "padded"
    assert [f.path for f in config.reward.functions] == ["f.py:g", "numeric_match"]
    assert config.checkpoint.resume == "auto" and config.algorithm["name"] == "dr_grpo"
    assert config.model.lora is not None and config.model.lora.rank == 16
    named = load_config(file, [*short, "model.packing=padded", "model=org/other"])
    assert named.model == config.model.model_copy(update={"path": "org/other"})
    other = load_config(file, ["reward.functions=[f.py:g]", "model.lora=4", "checkpoint.resume=false"])
    assert other.model.lora is not None and other.model.lora.rank == 4 and other.checkpoint.resume == "never"
    assert load_config(file, ["reward.functions=[f.py:g]", "model.lora=false"]).model.lora is None
