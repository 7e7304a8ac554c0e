"""`load_inputs`: reads tokenizer, datasets and rewards, and checks them against the settings and the model.

A run begins with it, and `rlhf check` calls it too, so that what passes the check also starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config.checks.run import return_candidates
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.prompts import PromptDataset
from rlhf.data.texts import Text, load_texts
from rlhf.environments.protocol import Environments
from rlhf.inputs import Inputs
from rlhf.models.chat import ChatError, set_variables
from rlhf.models.pretrained import decoded, eos_token_ids, load_model_config, load_tokenizer
from rlhf.models.vision.processor import Processor, load_processor
from rlhf.monitoring.sinks import check_installed
from rlhf.plugins import load_plugin
from rlhf.preflight.datasets import Reader, check_images
from rlhf.preflight.environments import check_rewards, load_environments
from rlhf.preflight.models import check_lengths, check_models, check_trainable, check_weight_files
from rlhf.preflight.reference import check_named, check_reference
from rlhf.preflight.tags import ends_of, opened_tag, with_opened
from rlhf.preflight.tokens import Tokenised, check_tokens
from rlhf.preflight.vllm import check_adapter, check_vllm
from rlhf.rewards.judges.duels import asking
from rlhf.rewards.judges.judged import JudgedRewards
from rlhf.rewards.judges.plugin import JudgeSpec
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards


def load_inputs(config: Config, *, world_size: int = 1, pickles: Mapping[str, bytes] | None = None) -> Inputs:
    """Reads everything that a policy run needs except weights.

    `pickles`: the reward functions that are in memory only, by their paths (rlhf/monitoring/objects.py).

    Raises ConfigError or another ValueError that says what was expected, what came and what to do.
    """
    algorithm = config.build_algorithm()
    _check_settings(config, algorithm, world_size)
    model = load_model_config(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    check_lengths(config, model)
    check_reference(config, algorithm, model, tokenizer)
    check_trainable(config.model, model)
    processor = load_processor(config.model.path, tokenizer)
    check_adapter(config, processor)
    _set_template(config, tokenizer, processor)
    environments, conversation = load_environments(config, tokenizer, processor)
    check_rewards(config, algorithm, environments)
    ends = _eos_token_ids(config, tokenizer)
    reader = Reader(config, tokenizer, processor, ends, environments, conversation)
    train, offline = reader.train(algorithm)
    check_named(config, algorithm, train)
    held_out, eval_pairs = reader.held_out(algorithm)
    check_images(config, algorithm, train)
    texts, datasets = _texts(config, tokenizer), [train] if held_out is None else [train, held_out]
    found = Tokenised(datasets, [d for d in (offline, eval_pairs) if d is not None], texts, ends)
    check_tokens(config.model.path, model, tokenizer, found.named())
    specs = _reward_specs(config, train, tokenizer, pickles or {})
    rewards = _rewards(config, specs, train, tokenizer, ends, environments)
    _check_columns(config, train, held_out, rewards, environments)
    check_weight_files(config, algorithm, world_size)
    return Inputs(
        tokenizer,
        model,
        train,
        held_out,
        rewards,
        algorithm,
        ends,
        texts,
        processor,
        offline,
        environments=environments,
        conversation=conversation,
        eval_pairs=eval_pairs,
    )


def _texts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Text, ...]:
    if config.ptx.path is None:
        return ()
    return tuple(load_texts(config.ptx, tokenizer, config.learner.microbatch_tokens))


def _check_settings(config: Config, algorithm: Algorithm, world_size: int) -> None:
    """What the settings alone can tell."""
    _check_ranks(config, world_size)
    _check_installed(config)
    check_vllm(config, world_size)
    _check_sampling(config, algorithm)
    _check_ahead(config, algorithm)
    check_models(config, algorithm)


def _check_columns(
    config: Config,
    train: PromptDataset,
    held_out: PromptDataset | None,
    rewards: Rewards,
    environments: Environments | None,
) -> None:
    """Raises ConfigError when environments or, in the held-out prompts, reward functions lack a column."""
    for where, dataset in (("train", train), ("eval", held_out)):
        try:
            if environments is not None and dataset is not None:
                environments.check_columns(dataset.columns)
            if dataset is not None and dataset is held_out:
                with rewards.without_judge():
                    rewards.check_columns(_columns(dataset, environments))
        except ValueError as error:
            raise ConfigError(f"data.{where}, {getattr(config.data, where)}: {error}") from None


def _set_template(config: Config, tokenizer: PreTrainedTokenizerBase, processor: Processor | None) -> None:
    """Sets the variables of `data.chat_template_kwargs` in the chat template. Raises ConfigError."""
    variables = config.data.chat_template_kwargs
    if not variables:
        return
    target: Any = tokenizer if processor is None else processor
    try:
        target.chat_template = set_variables(target.chat_template, variables)
    except ChatError as error:
        raise ConfigError(str(error)) from None


def _columns(prompts: PromptDataset, environments: Environments | None) -> tuple[str, ...]:
    """What reward functions may ask for beside what they always get."""
    images = ("images",) if any(prompt.images for prompt in prompts.prompts) else ()
    return (*prompts.columns, *(() if environments is None else ("environments",)), *images)


def _check_ranks(config: Config, world_size: int) -> None:
    """Raises ConfigError when a rank would have no prompt in a step or in an update."""
    if config.rollout.prompts_per_step < world_size:
        raise ConfigError(
            f"rollout.prompts_per_step is {config.rollout.prompts_per_step}, fewer than "
            f"the {world_size} ranks: raise it, or start fewer ranks"
        )
    if config.learner.minibatches > config.rollout.prompts_per_step // world_size:
        raise ConfigError(
            f"learner.minibatches is {config.learner.minibatches}: with "
            f"{config.rollout.prompts_per_step} prompts a step some of the {world_size} ranks would have "
            "nothing to learn from in an update; lower it, or raise rollout.prompts_per_step"
        )


def _check_installed(config: Config) -> None:
    """Raises SinkError or ConfigError when the package of a sink or the engine of a plugin cannot be had."""
    for sink in config.monitor.sinks:
        check_installed(sink)
    if ":" in config.rollout.engine and not callable(load_plugin(config.rollout.engine)):
        raise ConfigError(f"rollout.engine: {config.rollout.engine} is neither a class nor a function")


def _reward_specs(
    config: Config, train: PromptDataset, tokenizer: PreTrainedTokenizerBase, pickles: Mapping[str, bytes]
) -> list[RewardSpec]:
    opened = opened_tag(train.prompts, tokenizer)
    return [
        RewardSpec(**with_opened(function, opened), pickled=pickles.get(function.path))
        for function in config.reward.functions
    ]


def _rewards(
    config: Config,
    specs: Sequence[RewardSpec],
    train: PromptDataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: tuple[int, ...],
    environments: Environments | None,
) -> Rewards:
    judge, share = config.reward.preference, config.reward.max_failed_share
    columns = _columns(train, environments)
    if judge is None:
        rewards = Rewards(specs, columns, max_failed_share=share)
    else:
        spec = JudgeSpec(**judge.model_dump(exclude={"both_orders"}))
        rewards = JudgedRewards(specs, columns, spec, asking(config), max_failed_share=share)
    rewards.environment_rewards = environments is not None and environments.gives_rewards
    rewards.max_steps = config.steps
    rewards.steps_per_epoch = len(train) / config.rollout.prompts_per_step
    if config.reward.special_tokens == "keep":
        rewards.dropped_tokens = ends_of(tokenizer, eos_token_ids)
    rewards.decode = partial(decoded, tokenizer, dropped=rewards.dropped_tokens)
    return rewards


def _check_sampling(config: Config, algorithm: Algorithm) -> None:
    """Raises ConfigError when candidates are recorded for each token and no `top_k` bounds their number."""
    rollout = config.rollout
    if return_candidates(config, algorithm) and not rollout.top_k:
        raise ConfigError(
            f"rollout.top_p = {rollout.top_p} and rollout.min_p = {rollout.min_p} truncate the distribution, "
            f"and algorithm.mismatch.kind = {algorithm.mismatch.kind} compares log-probs among the "
            "candidates that truncation leaves, which are recorded for each token (4 bytes each): set "
            "rollout.top_k too, to bound their number, to 1000 for example, or set "
            "algorithm.mismatch.kind=none, which learns as if nothing had been truncated"
        )


def _check_ahead(config: Config, algorithm: Algorithm) -> None:
    if config.rollout.ahead and algorithm.mismatch.kind == "none" and algorithm.needs_rewards:
        raise ConfigError(
            "rollout.ahead = 1 samples with weights one step older than those that learn, and "
            "algorithm.mismatch.kind = none would not correct for it; set algorithm.mismatch.kind=token_tis, "
            "or rollout.ahead=0"
        )


def _eos_token_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The end-of-sequence tokens of tokenizer, model and `rollout.stop_token_ids`.

    Raises ConfigError when there is none at all.
    """
    ids = eos_token_ids(config.model.path).union(config.rollout.stop_token_ids)
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ConfigError(
            f"{config.model.path} has no end-of-sequence token; set rollout.stop_token_ids, or every "
            "completion is cut at its limit"
        )
    return tuple(sorted(ids))
