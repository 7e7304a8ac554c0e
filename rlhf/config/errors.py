"""Error messages for wrong settings: the key, what was expected, what came, and which key was meant."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf.config.trl import RENAMED, answer_for_setting

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


@dataclass(frozen=True, slots=True)
class Arguments:
    """The settings that single algorithms have."""

    algorithm: str = ""
    """The algorithm that the run has."""
    own: frozenset[str] = frozenset()
    """Its settings that are no sections."""
    owners: Mapping[str, str] = field(default_factory=dict[str, str])
    """For each setting of any algorithm, the names of the algorithms that have it."""


def explain(
    error: ValidationError, *, prefix: str, schema: type[BaseModel], arguments: Arguments = Arguments()
) -> Iterator[str]:
    """A line for each problem of `error`: the key, what was expected, what came, and for an unknown key the
    one that was probably meant.

    `prefix`: dotted key of the section that `schema` describes. `arguments`: what an unknown key may stand
    for besides the settings of `schema`.
    """
    problems, before = error.errors(), None
    for problem in problems:
        where = ".".join([prefix, *map(str, problem["loc"])] if prefix else map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            yield f"unknown setting {where}{_help(where, problem['input'], prefix, schema, arguments)}"
        elif problem["type"] == "too_short":
            # pydantic also calls a list too short when its entries have problems, which have own lines
            if not any(len(p["loc"]) > len(problem["loc"]) for p in problems):
                yield f"{where}: needs at least {problem.get('ctx', {}).get('min_length', 1)}, got none"
        elif problem["type"] == "missing":
            yield f"{where} is required"
        elif problem["type"] == "value_error":
            yield f"{where}: {message}" if where and not message.startswith(where) else message
        elif _branch(problem) is None:
            yield f"{where}: must {_expected(problem, schema)}, got {problem['input']!r:.200}"
        elif _branch(problem) != _branch(before):
            branches = [_expected(p, schema) for p in problems if _branch(p) == _branch(problem)]
            place = where.rpartition(".")[0]
            yield f"{place}: must {' or '.join(branches)}, got {problem['input']!r:.200}"
        before = problem


def _help(where: str, value: object, prefix: str, schema: type[BaseModel], arguments: Arguments) -> str:
    """What follows the unknown setting `where`: the setting of the run's algorithm, the answer for one of
    TRL, the nearest setting, or the algorithms that have such a setting; nothing where there is none."""
    last = where.rpartition(".")[2]
    argument = RENAMED.get((arguments.algorithm, last), last)
    if argument in arguments.own and f"algorithm.{argument}" != where:
        return f"; did you mean algorithm.{argument}?"
    answer = answer_for_setting(last, value)
    if answer is not None:
        return f"; coming from TRL: {answer}"
    owner = arguments.owners.get(last)
    hint = nearest_setting(where, prefix, schema, cutoff=0.6 if owner is None else 0.85)
    if hint:
        return f"; did you mean {hint}?"
    return f", which is one of {owner}" if owner else ""


def _branch(problem: ErrorDetails | None) -> tuple[int | str, ...] | None:
    """The place of a setting that may be of several types, for which pydantic reports a problem for each
    type; None for a problem of another kind."""
    *place, last = problem["loc"] if problem else ("",)
    return tuple(place) if re.match(r"constrained-|literal\[", str(last)) else None


def _expected(problem: ErrorDetails, schema: type[BaseModel]) -> str:
    """What was expected, as words that follow "must"."""
    limits: Mapping[str, Any] = problem.get("ctx", {})
    kind = problem["type"]
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        return words.format(limits[key])
    if kind == "literal_error":
        allowed: str = limits["expected"]
        near = difflib.get_close_matches(str(problem["input"]), allowed.split("'")[1::2], n=1)
        return f"be {allowed}" + (f" (did you mean {near[0]}?)" if near else "")
    if kind in ("model_type", "model_attributes_type"):
        section = _section_at(problem["loc"], schema)
        keys = ", ".join(section.model_fields) if section else ""
        return f"be a section, with settings of {keys}" if keys else "be a section of settings"
    return next((words for start, words in KINDS.items() if kind.startswith(start)), problem["msg"])


BOUNDS = {
    "greater_than": ("gt", "be above {:g}"),
    "greater_than_equal": ("ge", "be {:g} or more"),
    "less_than": ("lt", "be below {:g}"),
    "less_than_equal": ("le", "be {:g} or less"),
}
KINDS = {
    "int": "be a whole number",
    "float": "be a number",
    "bool": "be true or false",
    "string": "be text",
    "tuple": "be a list",
    "list": "be a list",
    "dict": "be settings with their values",
}


def _section_at(place: Sequence[int | str], schema: type[BaseModel]) -> type[BaseModel] | None:
    """The section whose keys lead from `schema` along `place`; None where there is none."""
    found: type[BaseModel] | None = schema
    for key in place:
        field = None if found is None else found.model_fields.get(str(key))
        found = None if field is None else section_of(field.annotation)
    return found


def nearest_setting(where: str, prefix: str, schema: type[BaseModel], *, cutoff: float) -> str | None:
    """The setting that was probably meant by an unknown one, by its spelling or as another framework's name.

    `cutoff`: how similar in spelling a setting must be, 0 to 1.
    """
    names = list(setting_names(schema, f"{prefix}." if prefix else ""))
    parent, _, last = where.rpartition(".")
    siblings = {n.rpartition(".")[2]: [n] for n in names if n.rpartition(".")[0] == parent}
    leaves: dict[str, list[str]] = {}
    for name in names:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    return (
        _close(last, siblings, 0.85)
        or MEANT.get(last)
        or _close(last, siblings, cutoff)
        or _close(last, leaves, cutoff)
        or _close(where, {name: [name] for name in names}, cutoff)
    )


def _close(word: str, settings: Mapping[str, Sequence[str]], cutoff: float) -> str | None:
    """The settings of the word most similar to `word`, if one is similar enough."""
    near = difflib.get_close_matches(word, settings, n=1, cutoff=cutoff)
    return " or ".join(settings[near[0]]) if near else None


def setting_names(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the settings, except those of single algorithms."""
    for key, info in schema.model_fields.items():
        section = section_of(info.annotation)
        if section is None:
            yield f"{prefix}{key}"
        else:
            yield from setting_names(section, f"{prefix}{key}.")


def section_of(kind: Any) -> type[BaseModel] | None:
    """The class of a section, where `kind` is `Section` or `Section | None`; else None."""
    parts = typing.get_args(kind)
    if len(parts) == 2 and parts[1] is type(None):
        kind = parts[0]
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None
