"""Settings of TRL 1.16 (GRPOConfig, RLOOConfig, DPOConfig and their kin), turned into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.algos.table import ALGORITHMS
from rlhf.config.foreign.given import Given, Ours, flat, stands_for
from rlhf.config.foreign.names import MEANT
from rlhf.config.foreign.preferences import RENAMED, answer_for_setting

DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/from-trl",
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_completion_length": 512,
    "num_iterations": 1,
    "learning_rate": 1e-6,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "epsilon": 0.2,
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "seed": 42,
    "lora_r": 16,
    "lora_alpha": 32,
}
BETAS = {"rloo": 0.05, "grpo": 0.0}
"""Defaults of `beta` by the method; of the preference methods it is 0.1."""
SAME = {
    "output_dir": "run_dir",
    "seed": "seed",
    "learning_rate": "learner.lr",
    "weight_decay": "learner.weight_decay",
    "max_grad_norm": "learner.max_grad_norm",
    "adam_epsilon": "learner.eps",
    "warmup_steps": "learner.warmup_steps",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "trust_remote_code": "model.trust_remote_code",
    "model_name_or_path": "model.path",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "save_total_limit": "checkpoint.keep_last",
    "run_name": "monitor.name",
    "precompute_ref_log_probs": "data.precompute_reference",
}
SAMPLING = {
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "max_completion_length": "rollout.max_completion_tokens",
    "num_generations": "rollout.group_size",
    "num_iterations": "learner.epochs",
}
"""Settings of online methods that differ in their names alone."""
LOSSES = {"grpo": "grpo", "dr_grpo": "dr_grpo", "cispo": "cispo", "sapo": "sapo"}
NOTHING = "nothing to set"
NOTES = {
    "logging_steps": f"{NOTHING}: every step is logged",
    "logging_strategy": f"{NOTHING}: every step is logged",
    "log_completions": f"{NOTHING}: the run's report has samples; monitor.samples_per_step",
    "num_completions_to_print": "monitor.samples_per_step",
    "max_prompt_length": "data.max_prompt_tokens, with data.long_prompts=skip",
    "bf16": "model.dtype: auto takes bfloat16 where it is fast",
    "fp16": "float16 is not here: model.dtype=auto takes bfloat16 where it is fast, else float32",
    "dtype": "model.dtype: auto, bfloat16 or float32",
    "torch_dtype": "model.dtype: auto, bfloat16 or float32",
    "use_vllm": "rollout.engine=vllm, or vllm-server",
    "mask_truncated_completions": "algorithm.drop_truncated, of dapo",
    "vllm_tensor_parallel_size": "not here: an engine has one GPU; servers of several by rollout.vllm.urls",
    "vllm_server_base_url": "rollout.vllm.urls",
    "vllm_importance_sampling_correction": "algorithm.mismatch.kind, none for no correction",
    "vllm_importance_sampling_mode": "algorithm.mismatch.kind",
    "vllm_importance_sampling_cap": "algorithm.mismatch.high",
    "vllm_importance_sampling_clip_max": "algorithm.mismatch.high",
    "vllm_importance_sampling_clip_min": "algorithm.mismatch.low",
    "multi_objective_aggregation": "algorithm.name=gdpo normalises each objective by itself",
    "max_tool_calling_iterations": "environment.max_turns, with environment.path",
    "generation_kwargs": "sampling is set by rollout.temperature, top_p, top_k, min_p and stop_token_ids",
    "repetition_penalty": "not here: log-probs would not be those of the policy",
    "shuffle_dataset": f"{NOTHING}: prompts are drawn in a shuffled order",
    "dataloader_num_workers": f"{NOTHING}: prompts are read and tokenised before the first step",
    "remove_unused_columns": f"{NOTHING}: further columns go to the reward functions",
    "reward_weights": "reward.functions: each has its weight, as {path: my_reward.py:score, weight: 0.5}",
    "lora_target_modules": "model.lora.targets",
    "ddp_timeout": "distributed.timeout",
    "deepspeed": f"{NOTHING} but distributed.mode=sharded (FSDP2), started by torchrun",
    "fsdp": f"{NOTHING} but distributed.mode=sharded (FSDP2), started by torchrun",
    "load_in_4bit": "not here: weights are trained in full precision, alone or under LoRA",
    "load_in_8bit": "not here: weights are trained in full precision, alone or under LoRA",
    "push_to_hub": "not here: rlhf export RUN FOLDER, then hf upload",
    "optim": f"{NOTHING}: AdamW with masters in float32",
    "resume_from_checkpoint": "checkpoint.resume=auto",
    "attn_implementation": f"{NOTHING}: the fastest exact attention is taken",
    "ref_model": "model.reference",
    "report_to": "monitor.sinks: tensorboard, wandb, trackio",
    "warmup_ratio": "learner.warmup_steps, a number of steps",
    "use_peft": "model.lora.rank",
}


def convert(settings: Mapping[str, Any], method: str = "grpo") -> Ours:
    """Our settings for those of TRL's trainer of `method`, as `grpo` or `dpo`.

    Raises ValueError: batch sizes do not fit together, or there is no such method here.
    """
    given, ours = Given(settings, DEFAULTS), Ours()
    if method not in ALGORITHMS:
        raise ValueError(
            f"there is no algorithm of the name {method} here; there are {', '.join(ALGORITHMS)}"
        )
    _names(given, ours, SAME)
    _data(given, ours)
    if method in ("grpo", "rloo"):
        _names(given, ours, SAMPLING)
        ours.settings |= flat(_online(given, ours, method), "algorithm.")
        _engine(given, ours)
        _rewards(given, ours)
    else:
        ours.settings |= {"data.mode": "offline"} | dict(flat(_offline(given, ours, method), "algorithm."))
    _batches(given, ours, online=method in ("grpo", "rloo"))
    _steps(given, ours)
    _lora(given, ours)
    for key in given.left():
        meant = MEANT.get(key)
        known = NOTES.get(key) or answer_for_setting(key, given.settings[key]) or meant
        ours.notes.setdefault(key, known or "nothing here stands for it")
    ours.read = given.read
    return ours


def answer(key: str, value: Any) -> str | None:
    """What stands for one setting of TRL; None: it has no such setting, or its default was given."""
    if key in NOTES:
        return NOTES[key]
    return stands_for(convert, key, value) if key in convert({}).read else None


def _names(given: Given, ours: Ours, same: Mapping[str, str]) -> None:
    for theirs, name in same.items():
        value = given[theirs]
        if value is not None:
            ours.settings[name] = value


def _data(given: Given, ours: Ours) -> None:
    """A script gives its trainer `train_dataset`; `dataset_name` is an option of TRL's own scripts."""
    settings, name = ours.settings, given["dataset_name"]
    if name is not None:
        place = name if given["dataset_config"] is None else f"{name}/{given['dataset_config']}"
        settings["data.train"] = f"{place}:{given['dataset_train_split'] or 'train'}"
        if given["eval_strategy"] not in ("no", None):
            settings["data.eval"] = f"{place}:{given['dataset_test_split'] or 'test'}"
    for theirs, ours_name in (("train_dataset", "data.train"), ("eval_dataset", "data.eval")):
        if theirs in given:
            settings[ours_name] = given[theirs]
    if "model" in given:
        settings["model.path"] = given["model"]
    for needed, theirs in (("data.train", "train_dataset"), ("model.path", "model_name_or_path")):
        if needed not in settings:
            settings[needed] = "SET_THIS"
            ours.notes[f"{theirs} (not found)"] = f"set {needed}"


def _steps(given: Given, ours: Ours) -> None:
    settings, most = ours.settings, given["max_steps"]
    updates = settings["learner.minibatches"] * settings.get("learner.epochs", 1)
    settings["steps"] = max(1, most // updates) if most and most > 0 else 100
    if most and most > 0 and updates > 1:
        ours.note(given, "max_steps", f"it counts updates, of which a step makes {updates} here")
    epochs, prompts = given["num_train_epochs"], settings["rollout.prompts_per_step"]
    passes = f"steps = {epochs} x prompts / {prompts}; set it (100 stands in for it)"
    ours.note(given, "num_train_epochs", f"{passes}, rlhf check says how many passes it is")
    schedule = str(given["lr_scheduler_type"]).rpartition(".")[2].lower()
    settings["learner.schedule"] = {"constant_with_warmup": "constant"}.get(schedule, schedule)
    if schedule not in ("constant", "constant_with_warmup", "linear", "cosine"):
        settings["learner.schedule"] = "linear"
        ours.note(given, "lr_scheduler_type", "learner.schedule: constant, linear, cosine or inverse_sqrt")
    for strategy, every, name in (
        ("eval_strategy", "eval_steps", "eval.every"),
        ("save_strategy", "save_steps", "checkpoint.every"),
    ):
        kind, number = given[strategy], given[every]
        if every in given and number and number >= 1:
            settings[name] = max(1, int(number) // updates)
        elif strategy in given and kind not in ("no", None):
            ours.note(given, strategy, f"{name}, in steps")
    if sinks := given.several("report_to"):
        settings["monitor.sinks"] = [s for s in sinks if s in ("tensorboard", "wandb", "trackio")]


def _batches(given: Given, ours: Ours, *, online: bool) -> None:
    """One device is assumed: TRL multiplies its batch sizes by the number of processes."""
    each, accumulated = given.whole("per_device_train_batch_size"), given.whole("gradient_accumulation_steps")
    told = "batches are counted over all ranks here; TRL multiplies this by its processes"
    ours.note(given, "per_device_train_batch_size", told)
    if not online:
        ours.settings |= {"rollout.prompts_per_step": each * accumulated, "learner.minibatches": 1}
        return
    update, whole = each * accumulated, given["generation_batch_size"]
    if whole is None:
        whole = each * (given["steps_per_generation"] or accumulated)
    group = given.whole("num_generations")
    prompts, updates = max(1, round(whole / group)), max(1, round(whole / update))
    ours.settings |= {"rollout.prompts_per_step": prompts, "learner.minibatches": min(prompts, updates)}
    if prompts * group != whole:
        ours.notes["num_generations"] = (
            f"{whole} completions a step are no multiple of {group}: look at the batch"
        )


def _online(given: Given, ours: Ours, method: str) -> dict[str, Any]:
    beta = given["beta"]
    kl = {"coef": BETAS[method] if beta is None else beta}
    if method == "rloo":
        return {"name": "rloo", "kl": kl}
    low, high = given["epsilon"], given["epsilon_high"]
    clips = {"clip_low": low, "clip_high": low if high is None else high}
    if given["delta"] is not None:
        clips["clip_dual"] = given["delta"]
    settings: dict[str, Any] = {"kl": kl | {"estimator": "k3"}}
    if given["entropy_coef"]:
        settings["entropy_coef"] = given["entropy_coef"]
    loss, scale = given["loss_type"] or "dapo", given["scale_rewards"]
    if given["importance_sampling_level"] in ("sequence", "sequence_token"):
        return {"name": "gspo", **clips, **settings}
    if loss == "dr_grpo" or scale in (False, "none"):
        return {"name": "dr_grpo", **clips, **settings}
    if loss in ("dapo", "bnpo"):
        ours.note(
            given,
            "loss_type",
            "with refill=0 no group is drawn again, but those whose rewards are all equal are not counted in "
            "the mean over tokens",
        )
        cut = {"drop_truncated": True} if given["mask_truncated_completions"] else {}
        return {"name": "dapo", "refill": 0, "overlong_cache": 0, **cut, **clips, **settings}
    if loss == "sapo":
        taus = {"tau_positive": given["sapo_temperature_pos"], "tau_negative": given["sapo_temperature_neg"]}
        return {"name": "sapo", **{k: v for k, v in taus.items() if v is not None}, **settings}
    if loss == "cispo":
        clips.pop("clip_dual", None)
        return {"name": "cispo", "clip_high": clips["clip_high"], **settings}
    if loss not in LOSSES:
        ours.note(given, "loss_type", f"there is no {loss} here: grpo stands in for it")
    return {"name": LOSSES.get(loss, "grpo"), **clips, **settings}


def _offline(given: Given, ours: Ours, method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": method}
    if given["loss_type"] is not None:
        ours.note(given, "loss_type", answer_for_setting("loss_type", given["loss_type"]) or "")
    for key in ("beta", "label_smoothing", "desirable_weight", "undesirable_weight"):
        if key in given:
            found[RENAMED.get((method, key), key)] = given[key]
    return found


def _engine(given: Given, ours: Ours) -> None:
    if given["use_vllm"]:
        server = given["vllm_mode"] == "server"
        ours.settings["rollout.engine"] = "vllm-server" if server else "vllm"


def _rewards(given: Given, ours: Ours) -> None:
    paths, weights = given.several("reward_funcs"), given.several("reward_weights")
    if not paths:
        paths = ["rlhf.rewards.builtin:math_match"]
        ours.notes["reward_funcs (not given)"] = "math_match stands in for it (docs/rewards.md has others)"
    elif any(path.startswith("FILE:") for path in paths):
        ours.note(given, "reward_funcs", "put the functions into a file of their own, this one trains")
    entries: list[dict[str, Any]] = [{"path": path} for path in paths]
    for entry, weight in zip(entries, weights, strict=False):
        entry["weight"] = weight
    ours.settings["reward.functions"] = entries


def _lora(given: Given, ours: Ours) -> None:
    if not (given["use_peft"] or "lora_r" in given):
        return
    ours.settings["model.lora.rank"] = given["lora_r"]
    ours.settings["model.lora.alpha"] = given["lora_alpha"]
    ours.note(
        given, "lora_dropout", "not here: log-probs before and after an update would be of two functions"
    )
    targets = given["lora_target_modules"]
    if isinstance(targets, list):
        ours.settings["model.lora.targets"] = targets
