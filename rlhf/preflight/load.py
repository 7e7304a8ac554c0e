"""`load_inputs`: reads tokenizer, datasets and rewards, and checks them against the settings and the model.

A run begins with it, and `rlhf check` calls it too, so that what passes the check also starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config.checks.run import return_candidates
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.chats import chats_column, prompt_of_chat
from rlhf.data.completions import OfflineDataset, load_offline
from rlhf.data.preferences import require_named
from rlhf.data.prompts import PromptDataset, first_row, load_prompts
from rlhf.data.rows import Row
from rlhf.data.texts import Text, load_texts
from rlhf.environments.conversation import Conversation
from rlhf.environments.protocol import Environments
from rlhf.inputs import Inputs
from rlhf.models.chat import ChatError, set_variables
from rlhf.models.pretrained import eos_token_ids, load_model_config, load_tokenizer
from rlhf.models.vision.processor import Processor, load_processor
from rlhf.monitoring.sinks import check_installed
from rlhf.plugins import load_plugin
from rlhf.preflight.environments import load_environments, with_tools
from rlhf.preflight.models import check_lengths, check_models, check_trainable, check_weight_files
from rlhf.preflight.probe import ignores_rewards
from rlhf.preflight.reference import check_named, check_reference
from rlhf.preflight.tags import ends_of, opened_tag, with_opened
from rlhf.preflight.tokens import Tokenised, check_tokens
from rlhf.preflight.vllm import check_adapter, check_vllm
from rlhf.rewards.judges.duels import asking
from rlhf.rewards.judges.judged import JudgedRewards
from rlhf.rewards.judges.plugin import JudgeSpec
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.types import Prompt

PAIR_COLUMNS = {"chosen", "completions", "label"}
"""Columns of which one tells that a file has completions to compare, not prompts alone."""


def load_inputs(config: Config, *, world_size: int = 1) -> Inputs:
    """Reads everything that a policy run needs except weights.

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
    read = partial(_prompts, config, tokenizer, processor, environments, conversation)
    ends = _eos_token_ids(config, tokenizer)
    offline = None
    if config.data.mode == "online":
        _check_has_prompts(config)
    else:
        offline = _offline(config, config.data.train, tokenizer, processor, ends)
        _check_imitated(config, algorithm, offline)
        _check_singles(config, algorithm, offline)
    train = read(config.data.train) if offline is None else offline.prompts
    check_named(config, algorithm, train)
    held_out, eval_pairs = _held_out(config, algorithm, tokenizer, processor, ends, read)
    _check_images(config, algorithm, train)
    texts, datasets = _texts(config, tokenizer), [train] if held_out is None else [train, held_out]
    found = Tokenised(datasets, [d for d in (offline, eval_pairs) if d is not None], texts, ends)
    check_tokens(config.model.path, model, tokenizer, found.named())
    rewards = _rewards(config, train, tokenizer, ends, environments)
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
    return prompts.columns if environments is None else (*prompts.columns, "environments")


def _held_out(
    config: Config,
    algorithm: Algorithm,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor | None,
    eos_token_ids: tuple[int, ...],
    read: Callable[[str], PromptDataset],
) -> tuple[PromptDataset | None, OfflineDataset | None]:
    """Prompts to sample from, and completions to compare, as `data.eval` has them and the algorithm can use.

    The prompts of pairs are sampled from, each once, where there are reward functions.
    """
    path = config.data.eval
    if path is None:
        return None, None
    if algorithm.preference is None or not PAIR_COLUMNS.intersection(first_row(path).columns):
        if not config.reward.functions and config.reward.preference is not None:
            raise ConfigError(
                f"data.eval, {path}, has prompts alone, whose samples reward.functions would score; "
                "reward.preference has nothing to compare them with: give reward.functions too (with "
                "pairs.labels: preference), or pairs (chosen, rejected) in data.eval, or leave data.eval out"
            )
        return read(path), None
    pairs = _offline(config, path, tokenizer, processor, eos_token_ids)
    if not config.reward.functions:
        # a judge has nothing to compare the samples with
        return None, pairs
    different: dict[tuple[int, ...], Prompt] = {}
    for prompt in pairs.prompts.prompts:
        different.setdefault(prompt.token_ids, prompt)
    return replace(pairs.prompts, prompts=tuple(different.values())), pairs


def _check_has_prompts(config: Config) -> None:
    """Raises ConfigError when completions are to be sampled, and the data has pairs without a prompt."""
    path, prompt = config.data.train, config.data.prompt_column
    columns = first_row(path).columns
    if {"chosen", "rejected"} <= set(columns) and prompt not in columns:
        raise ConfigError(
            f"{path} has chosen and rejected and no column {prompt}: to learn from them set data.mode: "
            "offline, with algorithm.name dpo for example; to sample completions give it the prompts"
        )


def _check_imitated(config: Config, algorithm: Algorithm, data: OfflineDataset) -> None:
    """Raises ConfigError when completions have no rewards, which the algorithm needs. Chats may have none."""
    row, name = first_row(data.source), config.data.reward_column
    if not data.imitates or name is None or ignores_rewards(algorithm):
        return
    chat = chats_column(row.columns, config.data.prompt_column) is not None
    if not chat and not any(t.turns and t.turns[-1] > 0 for g in data.groups for t in g.trajectories):
        require_named(row, "reward_column", name)


def _check_singles(config: Config, algorithm: Algorithm, data: OfflineDataset) -> None:
    """Raises ConfigError when the algorithm compares pairs and a line has a single completion, or when it
    compares at all and there are chats, which are for imitation."""
    single = next((g for g in data.groups if len(g.trajectories) == 1), None)
    offline = config.data.mode == "offline"
    if offline and config.pairs.labels == "preference" and not any(g.duels for g in data.groups):
        raise ConfigError(
            f"pairs.labels is preference, but {config.data.train} has no column probability, so no pair "
            "would have a label: set it to auto or hard"
        )
    if algorithm.preference is None or single is None:
        return
    name = config.algorithm["name"]
    chat = next((g for g in data.groups if any(t.turns and t.turns[-1] > 0 for t in g.trajectories)), None)
    if data.imitates or chat is not None:
        raise ConfigError(
            f"{config.data.train}, {(chat or single).prompt.id}: {name} compares better completions with "
            "worse ones, and a chat is neither: it is to be imitated; set algorithm.name=sft, or give pairs "
            "(chosen, rejected) or labels (completion, label), each with one message of the assistant"
        )
    if not algorithm.preference.form.takes_singles:
        raise ConfigError(
            f"{config.data.train}, {single.prompt.id}: {name} compares completions of one prompt, and here "
            "is a single one; for completions that are each labelled good or bad take algorithm.name kto, "
            "bco, nca or apo_zero"
        )
    if not all(0 <= reward <= 1 for reward in single.rewards):
        raise ConfigError(
            f"{config.data.train}, {single.prompt.id}: {name} reads the reward of a single completion as the "
            f"probability that it is good, which must lie between 0 and 1, got {single.rewards[0]:g}"
        )


def _offline(
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor | None,
    eos_token_ids: tuple[int, ...],
) -> OfflineDataset:
    eos = tokenizer.eos_token_id
    return load_offline(
        Path(path).expanduser(),
        tokenizer,
        config.data,
        max_completion_tokens=config.rollout.max_completion_tokens,
        eos_token_id=eos if isinstance(eos, int) else eos_token_ids[0],
        end_token_ids=eos_token_ids,
        processor=processor,
    )


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


def _rewards(
    config: Config,
    train: PromptDataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: tuple[int, ...],
    environments: Environments | None,
) -> Rewards:
    opened = opened_tag(train.prompts, tokenizer)
    specs = [RewardSpec(**with_opened(function, opened)) for function in config.reward.functions]
    judge, share = config.reward.preference, config.reward.max_failed_share
    if judge is None:
        rewards = Rewards(specs, _columns(train, environments), max_failed_share=share)
    else:
        spec = JudgeSpec(**judge.model_dump(exclude={"both_orders"}))
        rewards = JudgedRewards(specs, train.columns, spec, asking(config), max_failed_share=share)
    rewards.environment_rewards = environments is not None and environments.gives_rewards
    rewards.max_steps = config.steps
    rewards.steps_per_epoch = len(train) / config.rollout.prompts_per_step
    if config.reward.special_tokens == "keep":
        rewards.dropped_tokens = ends_of(tokenizer, eos_token_ids)
    return rewards


def _check_images(config: Config, algorithm: Algorithm, train: PromptDataset) -> None:
    if not any(prompt.images for prompt in train.prompts):
        if algorithm.perception is not None:
            raise ConfigError(
                f"a coefficient of perception is set, but no prompt of {config.data.train} has an image"
            )
        return
    if config.distributed.mode == "sharded":
        raise ConfigError(
            "prompts have images, and models that take images cannot be sharded: set "
            "distributed.mode=replicated"
        )
    if algorithm.needs_prompt_value or algorithm.prompt_temperature is not None:
        raise ConfigError(
            f"prompts have images, but the prompt value or temperature that {config.algorithm['name']} "
            "learns depends on text only; set algorithm.name=awr with a group baseline"
        )
    if algorithm.critic is not None and config.critic.trunk == "own":
        raise ConfigError(
            "critic.trunk is own and prompts have images, but a critic with its own trunk sees text only; "
            "set critic.trunk=policy"
        )


def _prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor | None,
    environments: Environments | None,
    conversation: Conversation | None,
    path: str,
) -> PromptDataset:
    data, columns = config.data, first_row(path).columns
    change: Callable[[Row], Row] = lambda row: row  # noqa: E731
    chats = chats_column(columns, data.prompt_column)
    if data.prompt_column not in columns and chats is not None:
        change = partial(prompt_of_chat, prompt_column=data.prompt_column, column=chats)
    return load_prompts(
        Path(path).expanduser(),
        tokenizer,
        prompt_column=data.prompt_column,
        image_column=data.image_column,
        max_prompt_tokens=data.max_prompt_tokens,
        long_prompts=data.long_prompts,
        processor=processor,
        change=with_tools(change, environments, conversation, data.prompt_column),
    )


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
