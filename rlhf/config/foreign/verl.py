"""Settings of verl 0.9 (`ppo_trainer.yaml`), turned into ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from rlhf.config.foreign.given import Given, Ours, flat, stands_for

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.model."
ROOTS = ("actor_rollout_ref", "trainer", "custom_reward_function", "reward_model", "ray_init")
"""Sections that verl has and we have not."""
DEFAULTS: dict[str, Any] = {
    f"{MODEL}path": "~/models/deepseek-llm-7b-chat",
    f"{MODEL}enable_gradient_checkpointing": True,
    f"{MODEL}lora_alpha": 16,
    "data.train_files": "~/data/rlhf/gsm8k/train.parquet",
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    f"{ROLLOUT}n": 1,
    f"{ROLLOUT}temperature": 1.0,
    f"{ROLLOUT}name": "vllm",
    f"{ACTOR}optim.lr": 1e-6,
    f"{ACTOR}optim.weight_decay": 0.01,
    f"{ACTOR}optim.lr_warmup_steps": -1,
    f"{ACTOR}optim.lr_warmup_steps_ratio": 0.0,
    f"{ACTOR}ppo_mini_batch_size": 256,
    f"{ACTOR}ppo_epochs": 1,
    f"{ACTOR}clip_ratio": 0.2,
    f"{ACTOR}clip_ratio_c": 3.0,
    f"{ACTOR}loss_agg_mode": "token-mean",
    f"{ACTOR}policy_loss.loss_mode": "vanilla",
    f"{ACTOR}kl_loss_coef": 0.001,
    f"{ACTOR}kl_loss_type": "low_var_kl",
    "critic.optim.lr": 1e-5,
    "critic.cliprange_value": 0.5,
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.kl_penalty": "kl",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.kl_ctrl.type": "fixed",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "algorithm.kl_ctrl.horizon": 10000,
    "algorithm.kl_ctrl.target_kl": 0.1,
    "trainer.total_epochs": 30,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
}
SAME = {
    "data.prompt_key": "data.prompt_column",
    "data.image_key": "data.image_column",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "data.trust_remote_code": "model.trust_remote_code",
    f"{MODEL}trust_remote_code": "model.trust_remote_code",
    f"{ROLLOUT}top_p": "rollout.top_p",
    f"{ROLLOUT}val_kwargs.n": "eval.samples",
    f"{ACTOR}grad_clip": "learner.max_grad_norm",
    f"{ACTOR}optim.clip_grad": "learner.max_grad_norm",
    f"{ACTOR}optim.betas": "learner.betas",
    f"{ACTOR}optim.lr_scheduler_type": "learner.schedule",
    f"{ACTOR}optim.warmup_style": "learner.schedule",
    f"{ACTOR}entropy_coeff": "algorithm.entropy_coef",
    f"{ROLLOUT}multi_turn.max_assistant_turns": "environment.max_turns",
    "trainer.project_name": "monitor.project",
    "trainer.experiment_name": "monitor.name",
    "trainer.max_actor_ckpt_to_keep": "checkpoint.keep_last",
    "trainer.default_local_dir": "run_dir",
}
"""Settings that differ in their names alone."""
ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
    "k3+": "k3+",
    "full": "exact",
}
ADVANTAGES = {
    "gae": "ppo",
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "gdpo": "gdpo",
}
SAMPLED = "evaluations sample like training; rlhf eval RUN --greedy decodes greedily"
TOKENS = "learner.microbatch_tokens bounds a microbatch, in tokens"
ENGINES = "not here yet: an engine has one GPU; servers of several are named by rollout.vllm.urls"
ALWAYS = "nothing to set"
NOTES = {
    f"{ACTOR}ppo_micro_batch_size": TOKENS,
    f"{ACTOR}ppo_micro_batch_size_per_gpu": TOKENS,
    f"{ACTOR}use_dynamic_bsz": TOKENS,
    f"{ACTOR}strategy": "nothing to set: FSDP2, where distributed.mode is sharded",
    f"{ACTOR}ulysses_sequence_parallel_size": "not here: a sequence is computed on one rank",
    f"{ACTOR}use_torch_compile": "nothing to set",
    f"{ACTOR}shuffle": "nothing to set: completions are dealt to minibatches at random",
    f"{MODEL}use_remove_padding": "nothing to set: sequences are packed, as model.packing says",
    f"{MODEL}use_liger": "nothing to set: logits are never held for all tokens",
    f"{MODEL}use_fused_kernels": "nothing to set: log-probs come from a fused kernel",
    f"{MODEL}enable_activation_offload": "not here yet",
    f"{MODEL}use_shm": "nothing to set: ranks of one machine share the files' pages",
    f"{ROLLOUT}do_sample": "nothing to set: completions are sampled",
    f"{ROLLOUT}calculate_log_probs": "nothing to set: the engine's log-probs are always kept",
    f"{ROLLOUT}mode": ALWAYS,
    f"{ROLLOUT}tensor_model_parallel_size": ENGINES,
    f"{ROLLOUT}data_parallel_size": ENGINES,
    f"{ROLLOUT}free_cache_engine": "nothing to set: an engine beside the learner sleeps while it learns",
    f"{ROLLOUT}enable_chunked_prefill": "rollout.vllm.args",
    f"{ROLLOUT}enable_prefix_caching": "rollout.vllm.args",
    f"{ROLLOUT}max_model_len": "nothing to set: data.max_prompt_tokens and rollout.max_completion_tokens",
    f"{ROLLOUT}log_prob_micro_batch_size": TOKENS,
    f"{ROLLOUT}log_prob_micro_batch_size_per_gpu": TOKENS,
    f"{ROLLOUT}log_prob_use_dynamic_bsz": TOKENS,
    f"{ROLLOUT}log_prob_max_token_len_per_gpu": TOKENS,
    f"{ACTOR}loss_agg_mode": "the algorithm: dapo means over all tokens, grpo over each completion first",
    f"{ROLLOUT}dtype": "nothing to set: the engine computes in model.dtype",
    f"{ROLLOUT}load_format": "nothing to set: weights come from the learner",
    f"{ROLLOUT}multi_turn.enable": "environment.path (docs/environments.md)",
    f"{ROLLOUT}multi_turn.tool_config_path": "environment.path: my_tools.py:CLASS (docs/environments.md)",
    f"{ROLLOUT}multi_turn.format": "environment.calls",
    f"{ROLLOUT}val_kwargs.temperature": SAMPLED,
    f"{ROLLOUT}val_kwargs.do_sample": SAMPLED,
    "data.filter_overlong_prompts_workers": "nothing to set",
    "data.shuffle": "nothing to set: prompts are drawn in a shuffled order",
    "data.return_raw_chat": "nothing to set",
    "data.val_batch_size": "nothing to set: all of data.eval is evaluated, or eval.max_prompts of it",
    "data.gen_batch_size": "nothing to set: rollout.prompts_per_step, and dapo draws again what it needs",
    "data.train_max_samples": "not here: give a smaller file",
    "data.val_max_samples": "eval.max_prompts",
    "data.seed": "seed",
    "reward_model.reward_manager": "reward.functions: functions with verl's signature work as they are",
    "reward.reward_manager.name": "reward.functions: functions with verl's signature work as they are",
    "reward_model.enable": "reward.functions=[{path: reward_model, params: {model: PATH}}]",
    "reward_model.model.path": "reward.functions=[{path: reward_model, params: {model: PATH}}]",
    "algorithm.use_pf_ppo": "not here",
    "trainer.val_before_train": "nothing to set: with data.eval the model is evaluated before the first step",
    "trainer.balance_batch": "nothing to set: groups are dealt to ranks by their tokens",
    "trainer.log_val_generations": "nothing to set: the run's report has samples; monitor.samples_per_step",
    "trainer.resume_from_path": "checkpoint.resume=auto goes on from the newest checkpoint of run_dir",
    "trainer.default_hdfs_dir": "not here: copy the run folder",
    "trainer.device": "nothing to set: a GPU is used where there is one",
}
"""What stands for settings that have no counterpart of one name; the shortest prefix that is in it counts."""
SECTIONS = {
    f"{ACTOR}fsdp_config.": "distributed.mode=sharded shards weights and optimizer; nothing is offloaded yet",
    "actor_rollout_ref.ref.": "nothing to set: the reference is sharded and packed like the policy",
    f"{ACTOR}megatron.": "not here: FSDP2 alone (distributed.mode=sharded)",
    "critic.": "critic.path, critic.trunk and critic.lr; the rest is that of the policy",
    "ray_init.": "nothing to set: torchrun starts the ranks",
}


def leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings in a section that verl has and we have not; any other setting as it is."""
    if where in ROOTS and isinstance(value, dict):
        yield from flat(cast(dict[str, Any], value), f"{where}.")
    else:
        yield where, value


def answer(key: str, value: Any) -> str | None:
    """What stands for one setting of verl, by its full name; None: verl has no such setting, or its default
    was given."""
    known = key.partition(".")[0] in ROOTS or key in SAME or key in NOTES or key in convert({}).read
    return stands_for(convert, key, value) if known else None


def convert(settings: Mapping[str, Any]) -> Ours:
    """Our settings for those of verl, by dotted names. Raises ValueError: batch sizes do not fit together."""
    given, ours = Given(settings, DEFAULTS), Ours()
    _run(given, ours)
    _data(given, ours)
    _rollout(given, ours)
    ours.settings |= flat(_algorithm(given, ours), "algorithm.")
    _learner(given, ours)
    for theirs, name in SAME.items():
        if theirs not in given:
            continue
        value = given[theirs]
        if value is not None:
            ours.settings[name] = value
    for key in given.left():
        section = next((text for prefix, text in SECTIONS.items() if key.startswith(prefix)), None)
        ours.notes.setdefault(key, NOTES.get(key) or section or "nothing here stands for it")
    ours.read = given.read
    return ours


def _run(given: Given, ours: Ours) -> None:
    given.seen("trainer.critic_warmup", "algorithm.filter_groups.metric")
    ours.settings["run_dir"] = f"runs/{given['trainer.experiment_name'] or 'verl'}"
    ours.settings["steps"] = given["trainer.total_training_steps"] or 100
    if "trainer.total_training_steps" not in given:
        epochs = given["trainer.total_epochs"]
        ours.note(
            given,
            "trainer.total_epochs",
            f"steps = {epochs} x prompts / {given['data.train_batch_size']}; set it (100 stands in for it), "
            "rlhf check says how many passes it is",
        )
    for theirs, name in (("test_freq", "eval.every"), ("save_freq", "checkpoint.every")):
        every = given[f"trainer.{theirs}"]
        if every is not None:
            ours.settings[name] = max(0, every)
    if sinks := given.several("trainer.logger"):
        ours.settings["monitor.sinks"] = [s for s in sinks if s in ("tensorboard", "wandb")]
    if given["trainer.resume_mode"] in ("auto", "resume_path"):
        ours.settings["checkpoint.resume"] = "auto"
    nodes, gpus = given.whole("trainer.nnodes"), given.whole("trainer.n_gpus_per_node")
    if "trainer.n_gpus_per_node" in given and nodes * gpus > 1:
        ours.settings["distributed.mode"] = "sharded"
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if nodes > 1 else ""
        ours.launch = f"torchrun {several}--nproc-per-node {gpus} rlhf/train.py"


def _data(given: Given, ours: Ours) -> None:
    for theirs, name in (("train_files", "data.train"), ("val_files", "data.eval")):
        files = given.several(f"data.{theirs}")
        if len(files) > 1:
            ours.note(given, f"data.{theirs}", "one file: put several together, they may differ in columns")
        if files:
            ours.settings[name] = files[0]
    ours.settings["data.max_prompt_tokens"] = given["data.max_prompt_length"]
    if given["data.filter_overlong_prompts"]:
        ours.settings["data.long_prompts"] = "skip"
    if given["data.truncation"] in ("left", "right", "middle"):
        ours.note(given, "data.truncation", "no prompt is cut: data.long_prompts=skip leaves longer ones out")
    path = given["custom_reward_function.path"] or given["reward.custom_reward_function.path"]
    name = given["custom_reward_function.name"] or given["reward.custom_reward_function.name"]
    if path:
        ours.settings["reward.functions"] = [{"path": f"{path}:{name or 'compute_score'}"}]
    else:
        ours.settings["reward.functions"] = [{"path": "rlhf.rewards.builtin:math_match"}]
        ours.notes["custom_reward_function.path (not given)"] = (
            "verl takes a function by data_source; math_match stands in for it (docs/rewards.md has others)"
        )


def _rollout(given: Given, ours: Ours) -> None:
    engine = given[f"{ROLLOUT}name"]
    ours.settings["rollout.engine"] = engine if engine in ("vllm", "hf") else "native"
    if engine not in ("vllm", "hf"):
        ours.note(given, f"{ROLLOUT}name", "engines here are native, vllm, vllm-server and hf")
    ours.settings["rollout.prompts_per_step"] = given.whole("data.train_batch_size")
    ours.settings["rollout.group_size"] = given.whole(f"{ROLLOUT}n")
    ours.settings["rollout.max_completion_tokens"] = (
        given[f"{ROLLOUT}response_length"] or given["data.max_response_length"]
    )
    ours.settings["rollout.temperature"] = given[f"{ROLLOUT}temperature"]
    top_k = given[f"{ROLLOUT}top_k"]
    if top_k is not None:
        ours.settings["rollout.top_k"] = max(0, top_k)
    arguments = {
        name: given[ROLLOUT + name]
        for name in ("gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs", "enforce_eager")
        if ROLLOUT + name in given
    }
    if arguments and engine == "vllm":
        ours.settings["rollout.vllm.args"] = arguments


def _algorithm(given: Given, ours: Ours) -> dict[str, Any]:
    estimator, mode = given["algorithm.adv_estimator"], given[f"{ACTOR}policy_loss.loss_mode"]
    name = ADVANTAGES.get(estimator)
    if name is None:
        ours.note(given, "algorithm.adv_estimator", f"there is no {estimator} here: grpo stands in for it")
        name = "grpo"
    if mode in ("gspo", "sapo", "cispo"):
        name = mode
    elif mode != "vanilla":
        ours.note(given, f"{ACTOR}policy_loss.loss_mode", f"there is no {mode} here")
    settings = _clips(given) | {"kl": _kl(given)}
    if name == "grpo":
        name, settings = _grpo(given, ours, settings)
    if name == "ppo":
        settings.pop("clip_dual", None)
        critic = {"gamma": given["algorithm.gamma"], "lam": given["algorithm.lam"]}
        critic |= {"value_clip": given["critic.cliprange_value"]}
        settings["critic"] = critic | {"warmup_steps": given["trainer.critic_warmup"] or 0}
        ours.settings["critic.lr"] = given["critic.optim.lr"]
        if given["critic.model.path"]:
            ours.settings["critic.path"] = given["critic.model.path"]
    if name == "rloo":
        settings = {"kl": settings["kl"]}
    if name == "sapo":
        settings = {"kl": settings["kl"], "tau_positive": given[f"{ACTOR}tau_pos"] or 1.0}
        settings["tau_negative"] = given[f"{ACTOR}tau_neg"] or 1.05
    if name == "cispo":
        settings.pop("clip_dual", None)
    return {"name": name, **settings}


def _grpo(given: Given, ours: Ours, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """GRPO with its variants: which mean the loss is, and whether groups without signal are drawn again."""
    mean = given[f"{ACTOR}loss_agg_mode"]
    if not given["algorithm.norm_adv_by_std_in_grpo"]:
        return "dr_grpo", settings
    if given["algorithm.filter_groups.enable"]:
        again = given["algorithm.filter_groups.max_num_gen_batches"]
        return "dapo", settings | {"refill": max(0, again - 1) if again else 9}
    if mean == "seq-mean-token-mean":
        return "grpo", settings
    if mean == "token-mean":
        ours.note(
            given,
            f"{ACTOR}loss_agg_mode",
            "dapo takes the mean over tokens; with refill=0 no group is drawn again, but those whose rewards "
            "are all equal are not counted in the mean",
        )
        return "dapo", settings | {"refill": 0, "overlong_cache": 0}
    ours.note(given, f"{ACTOR}loss_agg_mode", f"there is no {mean} here: grpo, dapo or dr_grpo")
    return "grpo", settings


def _clips(given: Given) -> dict[str, Any]:
    both = given[f"{ACTOR}clip_ratio"]
    low, high = given[f"{ACTOR}clip_ratio_low"], given[f"{ACTOR}clip_ratio_high"]
    return {
        "clip_low": both if low is None else low,
        "clip_high": both if high is None else high,
        "clip_dual": given[f"{ACTOR}clip_ratio_c"],
    }


def _kl(given: Given) -> dict[str, Any]:
    """The KL term: in the loss, in the reward, or none."""
    in_loss, in_reward = given[f"{ACTOR}use_kl_loss"], given["algorithm.use_kl_in_reward"]
    if in_loss:
        estimator = ESTIMATORS.get(given[f"{ACTOR}kl_loss_type"], "k3")
        return {"coef": given[f"{ACTOR}kl_loss_coef"], "estimator": estimator, "placement": "loss"}
    if in_reward:
        found = {"coef": given["algorithm.kl_ctrl.kl_coef"], "placement": "reward"}
        found["estimator"] = ESTIMATORS.get(given["algorithm.kl_penalty"], "k1")
        if given["algorithm.kl_ctrl.type"] == "adaptive":
            found["target"] = given["algorithm.kl_ctrl.target_kl"]
            found["horizon"] = given["algorithm.kl_ctrl.horizon"]
        return found
    return {"coef": 0.0}


def _learner(given: Given, ours: Ours) -> None:
    settings, model = ours.settings, given[f"{MODEL}path"]
    settings["model.path"] = model
    settings["model.gradient_checkpointing"] = bool(given[f"{MODEL}enable_gradient_checkpointing"])
    rank = given[f"{MODEL}lora_rank"] or given[f"{MODEL}lora.rank"]
    if rank:
        settings["model.lora.rank"] = rank
        settings["model.lora.alpha"] = given[f"{MODEL}lora.alpha"] or given[f"{MODEL}lora_alpha"]
        targets = given[f"{MODEL}target_modules"]
        if isinstance(targets, list):
            settings["model.lora.targets"] = targets
    settings["learner.lr"] = given[f"{ACTOR}optim.lr"]
    settings["learner.weight_decay"] = given[f"{ACTOR}optim.weight_decay"]
    warmup, share = given[f"{ACTOR}optim.lr_warmup_steps"], given[f"{ACTOR}optim.lr_warmup_steps_ratio"]
    if (warmup or 0) > 0 or share:
        settings["learner.warmup_steps"] = warmup if warmup > 0 else round(share * settings["steps"])
    settings["learner.epochs"] = given[f"{ACTOR}ppo_epochs"]
    batch, mini = given.whole("data.train_batch_size"), given.whole(f"{ACTOR}ppo_mini_batch_size")
    if f"{ACTOR}ppo_mini_batch_size" not in given:
        mini = min(mini, batch)
    if batch % mini:
        raise ValueError(f"data.train_batch_size {batch} is no multiple of {ACTOR}ppo_mini_batch_size {mini}")
    settings["learner.minibatches"] = batch // mini
    tokens = given[f"{ACTOR}ppo_max_token_len_per_gpu"]
    if tokens is not None and given[f"{ACTOR}use_dynamic_bsz"]:
        settings["learner.microbatch_tokens"] = tokens
