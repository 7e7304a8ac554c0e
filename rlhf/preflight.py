"""Everything that can be known before weights are loaded: tokenizer, datasets, rewards, the model's limits.

The trainer begins with it and `rlhf check` is nothing else, so what passes the check starts.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config import Config
from rlhf.data import PromptDataset, load_prompts
from rlhf.distributed import this_device
from rlhf.estimate import Machine, estimate
from rlhf.offline import OfflineDataset, load_offline
from rlhf.plugins import load_plugin
from rlhf.pretrained import (
    check_writes_text,
    eos_token_ids,
    load_model_config,
    load_tokenizer,
    local_or_hub,
    text_settings,
)
from rlhf.pretraining import Text, load_texts
from rlhf.processor import Processor, load_processor
from rlhf.rewards import Rewards, RewardSpec
from rlhf.settings import ConfigError
from rlhf.types import AdvantageInputs
from rlhf.vllm_preflight import check_adapter, check_vllm

SINK_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads, weights excepted."""

    tokenizer: PreTrainedTokenizerBase
    model: PretrainedConfig
    train: PromptDataset
    eval: PromptDataset | None
    rewards: Rewards
    algorithm: Algorithm
    eos_token_ids: tuple[int, ...]
    texts: tuple[Text, ...] = ()
    """What `ptx` mixes in."""
    processor: Processor | None = None
    """Of a model that can see."""
    offline: OfflineDataset | None = None
    """The completions that `train`'s prompts come with, when they are learned from."""


def load_inputs(config: Config, *, world_size: int = 1) -> Inputs:
    """Raises ConfigError, or the ValueError of the part that is wrong: what was expected and what came."""
    if config.rollout.prompts_per_step < world_size:
        raise ConfigError(
            f"rollout.prompts_per_step is {config.rollout.prompts_per_step}, fewer than "
            f"the {world_size} ranks"
        )
    if config.learner.minibatches > config.rollout.prompts_per_step // world_size:
        raise ConfigError(
            f"learner.minibatches is {config.learner.minibatches}: with "
            f"{config.rollout.prompts_per_step} prompts a step some of the {world_size} ranks would have "
            "nothing to learn from in an update"
        )
    _check_installed(config)
    check_vllm(config, world_size)
    algorithm = config.build_algorithm()
    _check_sampling(config, algorithm)
    _check_ahead(config, algorithm)
    model = load_model_config(config.model.path)
    check_writes_text(config.model.path, model)
    tokenizer = load_tokenizer(config.model.path)
    for path in (config.model.reference, config.critic.path if algorithm.critic is not None else None):
        if path is not None:
            local_or_hub(path)
    _check_lengths(config, model)
    _check_weights(config, model)
    processor = load_processor(config.model.path, tokenizer)
    check_adapter(config, processor)
    ends = _eos_token_ids(config, tokenizer)
    offline = None if config.data.mode == "online" else _offline(config, tokenizer, processor, ends)
    train = _prompts(config, config.data.train, tokenizer, processor) if offline is None else offline.prompts
    held_out = None if config.data.eval is None else _prompts(config, config.data.eval, tokenizer, processor)
    _check_pictures(config, algorithm, train)
    texts = ()
    if config.ptx.path is not None:
        texts = tuple(load_texts(config.ptx, tokenizer, config.learner.microbatch_tokens))
    rewards = _rewards(config, train)
    if held_out is not None:
        try:
            rewards.check_columns(held_out.columns)
        except ValueError as error:
            raise ConfigError(f"data.eval, {config.data.eval}: {error}") from None
    return Inputs(tokenizer, model, train, held_out, rewards, algorithm, ends, texts, processor, offline)


def _offline(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor | None,
    eos_token_ids: tuple[int, ...],
) -> OfflineDataset:
    eos = tokenizer.eos_token_id
    return load_offline(
        Path(config.data.train).expanduser(),
        tokenizer,
        config.data,
        max_completion_tokens=config.rollout.max_completion_tokens,
        eos_token_id=eos if isinstance(eos, int) else eos_token_ids[0],
        processor=processor,
    )


def _check_installed(config: Config) -> None:
    """What is asked for by name, beside the algorithm and the rewards, is there."""
    for sink in config.monitor.sinks:
        package = SINK_PACKAGES[sink]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"monitor.sinks has {sink}, but {package} is not installed: pip install {package}"
            )
    if ":" in config.rollout.engine and not callable(load_plugin(config.rollout.engine)):
        raise ConfigError(f"rollout.engine: {config.rollout.engine} is no class or function")


def _rewards(config: Config, prompts: PromptDataset) -> Rewards:
    specs = [RewardSpec(**function.model_dump()) for function in config.reward.functions]
    return Rewards(specs, prompts.columns, max_failed_share=config.reward.max_failed_share)


def _check_pictures(config: Config, algorithm: Algorithm, train: PromptDataset) -> None:
    if not any(prompt.images for prompt in train.prompts):
        if algorithm.perception is not None:
            raise ConfigError(f"perception has a weight, but no prompt of {config.data.train} has a picture")
        return
    if config.distributed.mode == "sharded":
        raise ConfigError(
            "prompts have pictures, and models that see are not sharded: take distributed.mode=replicated"
        )
    if algorithm.needs_prompt_value or algorithm.balance is not None:
        raise ConfigError(
            f"prompts have pictures, and what {config.algorithm['name']} learns of a prompt, it learns from "
            "text alone; take awr with a baseline of the group"
        )
    if algorithm.critic is not None and config.critic.trunk == "own":
        raise ConfigError(
            "critic.trunk is own, but a critic of its own sees no pictures; set critic.trunk to policy"
        )


def _prompts(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, processor: Processor | None
) -> PromptDataset:
    data = config.data
    return load_prompts(
        Path(path).expanduser(),
        tokenizer,
        prompt_column=data.prompt_column,
        image_column=data.image_column,
        max_prompt_tokens=data.max_prompt_tokens,
        long_prompts=data.long_prompts,
        processor=processor,
    )


def _check_sampling(config: Config, algorithm: Algorithm) -> None:
    """What truncation leaves is recorded token by token, which `top_k` must bound."""
    rollout = config.rollout
    if says_kept(config, algorithm) and not rollout.top_k:
        raise ConfigError(
            f"rollout.top_p = {rollout.top_p} and rollout.min_p = {rollout.min_p} truncate the distribution, "
            f"and algorithm.mismatch.kind = {algorithm.mismatch.kind} compares log-probs among the tokens "
            "that were left, which are recorded for each token (4 bytes each): set rollout.top_k too, which "
            "bounds them, to 1000 for example, or algorithm.mismatch.kind=none, which learns as if nothing "
            "had been truncated"
        )


def says_kept(config: Config, algorithm: Algorithm) -> bool:
    """Whether engine and learner renormalise over what truncation left, and so have to know it."""
    learned = config.data.mode != "offline"
    return learned and config.rollout.truncates and algorithm.mismatch.kind != "none"


def _check_ahead(config: Config, algorithm: Algorithm) -> None:
    if config.rollout.ahead and algorithm.mismatch.kind == "none":
        raise ConfigError(
            "rollout.ahead = 1 samples with weights one update older than those it is learned with, and "
            "algorithm.mismatch.kind = none would not correct for it; use token_tis, or rollout.ahead=0"
        )


def _check_lengths(config: Config, model: PretrainedConfig) -> None:
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    limit = text_settings(model).get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but {config.model.path} "
            f"has positions for {limit} tokens; lower one of the two"
        )


def _check_weights(config: Config, model: PretrainedConfig) -> None:
    quantization = model.to_dict().get("quantization_config")
    if quantization is not None:
        method = cast(dict[str, Any], quantization).get("quant_method", "an unknown method")
        what = "QLoRA is not supported" if config.model.lora else "they cannot be trained"
        raise ConfigError(
            f"the weights of {config.model.path} are quantized ({method}): {what}; give the model it was "
            "made from"
        )
    if config.model.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora is set, but peft is not installed: pip install 'tandem-rl[lora]'")


def _eos_token_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The end-of-sequence tokens of tokenizer and model. Raises ConfigError when there is none at all."""
    ids = eos_token_ids(config.model.path).union(config.rollout.stop_token_ids)
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ConfigError(
            f"{config.model.path} has no end-of-sequence token; set rollout.stop_token_ids, or every "
            "completion is cut at its limit"
        )
    return tuple(sorted(ids))


def describe(config: Config, inputs: Inputs, *, world_size: int = 1) -> Iterator[str]:
    """What a run of this config will do: the lines `rlhf check` prints."""
    rollout, learner = config.rollout, config.learner
    lengths = sorted(len(p.token_ids) for p in inputs.train.prompts)
    samples = rollout.prompts_per_step * rollout.group_size
    settings = {key: value for key, value in config.algorithm.items() if key != "name"}
    yield from _describe_models(config, inputs)
    yield f"algorithm    {config.algorithm['name']} " + ", ".join(f"{k}={v}" for k, v in settings.items())
    yield (
        f"data         {len(inputs.train)} prompts of {lengths[0]} to {lengths[-1]} tokens "
        f"(median {statistics.median(lengths):.0f}), {inputs.train.skipped} skipped as too long"
    )
    yield from _describe_pictures(config, inputs)
    yield f"held out     {_held_out(config, inputs)}"
    yield from _describe_completions(config, inputs, world_size)
    updates = learner.epochs * learner.minibatches
    yield (
        f"updates      {learner.epochs} epoch(s) x {learner.minibatches} minibatch(es) = {updates} a step, "
        f"microbatches of at most {learner.microbatch_tokens} tokens"
    )
    passes = config.steps * rollout.prompts_per_step / len(inputs.train)
    yield (
        f"the run      {config.steps} steps, {config.steps * samples} completions, "
        f"{passes:.1f} passes over the data"
    )
    yield f"run folder   {config.run_dir}"
    yield from estimate(config, inputs, world_size=world_size, machine=_machine(config, world_size)).lines()
    yield from (f"warning      {text}" for text in warnings(config, inputs))


def _held_out(config: Config, inputs: Inputs) -> str:
    if inputs.eval is None:
        return "none"
    several = len(config.reward.functions) > 1
    what = config.reward.success_objective or ("the weighted sum of rewards" if several else "the reward")
    return (
        f"{len(inputs.eval)} prompts x {config.eval.samples} samples; right where {what} is at least "
        f"{config.reward.success_threshold:g}"
    )


def _describe_pictures(config: Config, inputs: Inputs) -> Iterator[str]:
    pictures = [len(p.images or ()) for p in inputs.train.prompts]
    if any(pictures):
        seeing = sum(n > 0 for n in pictures)
        yield f"pictures     {sum(pictures)}, with {seeing} of the {len(pictures)} prompts"
    if inputs.algorithm.perception is not None:
        given = config.perception
        yield (
            f"perception   coef {given.coef:g}, entropies {given.entropy_coef:g} and "
            f"{given.masked_entropy_coef:g}; {given.ratio:.0%} of the {given.patch}-pixel patches hidden"
        )


def _describe_models(config: Config, inputs: Inputs) -> Iterator[str]:
    reference = config.model.reference or config.model.path if inputs.algorithm.needs_reference else None
    lora = config.model.lora
    adapter = "" if lora is None else f", LoRA of rank {lora.rank}"
    yield (
        f"model        {config.model.path} ({inputs.model.model_type}), computed in {config.model.dtype}"
        f"{adapter}"
    )
    if reference and lora is not None and config.model.reference is None:
        reference = "the model, its adapter switched off"
    yield f"reference    {reference or 'none: no KL term, not loaded'}"
    if inputs.algorithm.critic is not None:
        start = config.critic.path or config.model.path
        kind = "a head on the policy" if config.critic.trunk == "policy" else f"its own model, from {start}"
        yield f"critic       {kind}, learning rate {config.critic.lr:g}"


def _machine(config: Config, world_size: int) -> Machine:
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Machine.measured(this_device(), dtype, ranks_here=ranks_here)


def _describe_completions(config: Config, inputs: Inputs, world_size: int) -> Iterator[str]:
    """Where a step's completions come from, and what gives them a reward."""
    rollout, data, offline = config.rollout, config.data, inputs.offline
    given = offline is not None and data.reward_column is not None
    functions = [f"{f.path} x {f.weight:g}" for f in config.reward.functions]
    yield f"rewards      {', '.join([f'column {data.reward_column} of the data'] * given + functions)}"
    for c in config.reward.constraints:
        bound = f"at most {c.bound:g}" if c.at_least is None else f"at least {c.bound:g}"
        yield f"constraint   mean of {c.objective} {bound}: multiplier from {c.start:g}, rate {c.rate:g}"
    samples = rollout.prompts_per_step * rollout.group_size
    drawn = f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {samples} completions"
    sampled = f"{drawn} of at most {rollout.max_completion_tokens} tokens on {world_size} rank(s)"
    if offline is None:
        yield f"a step       {sampled}"
        return
    yield f"completions  {offline.num_completions} in the data, {offline.skipped} skipped as too long"
    groups = f"{rollout.prompts_per_step} prompts with all their completions"
    first = groups if data.sampling == "groups" else f"{samples} completions, drawn as {data.sampling}"
    if data.mode == "offline":
        yield f"a step       {first}, from the data"
        return
    if data.offline_steps:
        yield f"steps 1 to {data.offline_steps:<3}{first}, from the data"
    yield f"then         {sampled}" + (", and the data's of the same prompts" if data.mix else "")


def warnings(config: Config, inputs: Inputs) -> Iterator[str]:
    """What is allowed and hardly ever meant."""
    yield from inputs.algorithm.cautions
    learned = config.data.mode != "offline"
    if config.rollout.truncates and learned and not says_kept(config, inputs.algorithm):
        yield (
            "rollout.top_k, top_p or min_p truncates the distribution, and with algorithm.mismatch.kind = "
            "none samples are learned from as if it had not been"
        )
    if config.rollout.group_size == 1 and learned and not _learns_from_one(inputs.algorithm):
        yield (
            f"rollout.group_size is 1, and {config.algorithm['name']} compares the completions of a prompt: "
            "all advantages are 0, so no reward is learned from"
        )
    if config.rollout.prompts_per_step > len(inputs.train):
        yield (
            f"a step draws {config.rollout.prompts_per_step} prompts, but the data has {len(inputs.train)}: "
            "some are drawn twice"
        )
    if inputs.offline is not None and inputs.offline.splitting:
        columns = ", ".join(inputs.offline.splitting)
        yield f"completions of one prompt are not compared where they differ in the columns {columns}"
    if inputs.train.skipped > len(inputs.train):
        left = len(inputs.train)
        yield f"{inputs.train.skipped} prompts are skipped as too long, more than are left ({left})"


def _learns_from_one(algorithm: Algorithm) -> bool:
    """Whether two prompts with a completion each, of which one is right, have any advantage."""
    if algorithm.critic is not None:
        return True
    one_each = torch.arange(2)
    rewards, none = torch.tensor([0.0, 1.0]), torch.zeros(2)
    inputs = AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=torch.ones(1),
        group=one_each,
        token_penalty=none,
        sequence=one_each,
        loss_mask=torch.ones(2, dtype=torch.bool),
        prompt_values=none,
        balance=torch.ones(2),
    )
    return bool(algorithm.advantage(inputs).any())
