"""Other names of our settings in TRL, verl and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OTHER_NAMES: Mapping[str, Sequence[str]] = {
    "run_dir": ("output_dir", "default_local_dir"),
    "steps": ("max_steps", "num_train_epochs", "total_epochs", "total_training_steps"),
    "model.path": ("model_name_or_path", "model_name", "model_id"),
    "model.reference": ("ref_model", "ref_model_path", "reference_model"),
    "model.dtype": ("torch_dtype", "bf16", "fp16"),
    "model.gradient_checkpointing": ("enable_gradient_checkpointing",),
    "model.lora.rank": ("lora_r", "lora_rank"),
    "model.lora.alpha": ("lora_alpha",),
    "data.train": ("train_files", "train_file", "train_dataset", "dataset", "dataset_name"),
    "data.eval": ("val_files", "eval_dataset", "val_dataset"),
    "data.prompt_column": ("prompt_key",),
    "data.max_prompt_tokens": ("max_prompt_length",),
    "data.max_prompt_tokens and rollout.max_completion_tokens": ("max_length",),
    "data.precompute_reference": ("precompute_ref_log_probs",),
    "reward.functions": ("reward_funcs", "reward_fn", "reward_model", "custom_reward_function"),
    "score.center_coef": ("center_rewards_coefficient",),
    "algorithm.name": ("adv_estimator", "loss_type"),
    "algorithm.kl.coef": ("kl", "beta", "kl_coef", "kl_loss_coef", "kl_penalty_coef", "init_kl_coef"),
    "algorithm.kl.estimator": ("kl_loss_type", "kl_penalty"),
    "algorithm.clip_low and algorithm.clip_high": ("epsilon", "clip_ratio", "cliprange", "clip_range"),
    "algorithm.clip_low": ("epsilon_low", "clip_ratio_low"),
    "algorithm.clip_high": ("epsilon_high", "clip_ratio_high"),
    "algorithm.clip_dual": ("delta", "clip_ratio_c"),
    "algorithm.critic.value_clip": ("cliprange_value",),
    "algorithm.critic.coef": ("vf_coef",),
    "algorithm.critic.gamma": ("gamma",),
    "algorithm.critic.lam": ("lam", "gae_lambda"),
    "algorithm.entropy_coef": ("entropy_coeff",),
    "rollout.engine": ("use_vllm", "vllm_mode"),
    "rollout.prompts_per_step": (
        "train_batch_size",
        "batch_size",
        "per_device_train_batch_size",
        "rollout_batch_size",
    ),
    "rollout.group_size": ("n", "num_generations", "n_samples_per_prompt", "group_size"),
    "rollout.max_completion_tokens": (
        "max_completion_length",
        "max_response_length",
        "response_length",
        "max_new_tokens",
        "max_tokens",
    ),
    "learner.lr": ("lr", "learning_rate"),
    "learner.schedule": ("lr_scheduler_type",),
    "learner.final_lr_share": ("min_lr_ratio", "min_lr_rate"),
    "learner.betas": ("adam_beta1", "adam_beta2"),
    "learner.eps": ("adam_epsilon",),
    "learner.max_grad_norm": ("grad_clip", "clip_grad"),
    "learner.epochs": ("num_iterations", "ppo_epochs", "num_ppo_epochs"),
    "learner.minibatches": ("ppo_mini_batch_size", "num_mini_batches"),
    "learner.microbatch_tokens": (
        "gradient_accumulation_steps",
        "micro_batch_size",
        "ppo_micro_batch_size_per_gpu",
        "ppo_max_token_len_per_gpu",
    ),
    "eval.every": ("eval_steps", "test_freq"),
    "checkpoint.every": ("save_steps", "save_freq"),
    "checkpoint.keep_last": ("save_total_limit", "max_ckpt_to_keep"),
    "checkpoint.resume": ("resume_from_checkpoint", "resume_mode"),
    "monitor.sinks": ("report_to", "logger"),
    "rollout.vllm.args": ("gpu_memory_utilization", "vllm_gpu_memory_utilization"),
}
"""Each setting, and the names (their last parts) that TRL, verl and others have for it; shown in
docs/settings.md."""
MEANT = {other: ours for ours, others in OTHER_NAMES.items() for other in others}
"""The setting that another framework's name stands for."""
