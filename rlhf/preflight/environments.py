"""The environments of a run: started before the datasets are read, which need their tools, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from transformers import PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.config.checks.preferences import beside_judge
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.prompts import TOOLS
from rlhf.data.rows import Row
from rlhf.environments.conversation import Conversation, ConversationError
from rlhf.environments.pool import EnvironmentPool
from rlhf.environments.protocol import Environments
from rlhf.models.chat import ChatError, messages_of
from rlhf.models.pretrained import eos_token_ids
from rlhf.models.vision.processor import Processor
from rlhf.types import Prompt

CHOOSES = "environment"
"""The column that names the environment of a line."""


def load_environments(
    config: Config, tokenizer: PreTrainedTokenizerBase, processor: Processor | None
) -> tuple[Environments, Conversation] | tuple[None, None]:
    """The environments of `environment.path`, with a process started, and what writes their turns; None where
    there are none.

    Raises ConfigError: one cannot be loaded, or the chat template cannot write its turns.
    """
    if not config.environment.path:
        return None, None
    conversation = _conversation(config, tokenizer, processor)
    try:
        environments = EnvironmentPool(config.environment)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    has_tools = [bool(environments.tools(name)) for name in environments.names]
    roles = ["tool"] * any(has_tools) + ["user"] * (not all(has_tools))
    try:
        conversation.check(roles=roles)
    except ConversationError as error:
        raise ConfigError(f"environment: {error}") from None
    return environments, conversation


def _conversation(
    config: Config, tokenizer: PreTrainedTokenizerBase, processor: Processor | None
) -> Conversation:
    ends = set(eos_token_ids(config.model.path))
    if isinstance(tokenizer.eos_token_id, int):
        ends.add(tokenizer.eos_token_id)
    return Conversation(tokenizer, frozenset(ends), processor, _no_images(config))


def _no_images(config: Config) -> str:
    """Why environments cannot show images in this run, whatever its model; empty where they can."""
    if config.distributed.mode == "sharded":
        return "models that take images cannot be sharded: set distributed.mode=replicated"
    if config.build_algorithm().critic is not None and config.critic.trunk == "own":
        return "a critic with its own trunk sees text only: set critic.trunk=policy"
    return ""


def check_rewards(config: Config, algorithm: Algorithm, environments: Environments | None) -> None:
    """Raises ConfigError: nothing gives episodes a reward, or an environment does, and a judge is of no use
    beside it."""
    reward = config.reward
    if environments is None or reward.functions or not algorithm.needs_rewards:
        return
    if environments.gives_rewards:
        beside = "get_reward of the environment"
        problem = None if reward.preference is None else beside_judge(config, algorithm, beside)
        if problem is not None:
            raise ConfigError(problem)
    elif reward.preference is None:
        raise ConfigError(
            f"nothing gives episodes a reward: {', '.join(environments.names)} has no get_reward, and "
            "reward.functions is empty; add either, or a judge as reward.preference"
        )


def with_tools(
    change: Callable[[Row], Row],
    environments: Environments | None,
    conversation: Conversation | None,
    column: str,
) -> Callable[[Row], Row]:
    """What is done to a line before it is checked: `change`, then its prompt gets the environment's tools."""
    if environments is None or conversation is None:
        return change
    return partial(_told, change, environments, conversation, column)


def _told(
    change: Callable[[Row], Row],
    environments: Environments,
    conversation: Conversation,
    column: str,
    row: Row,
) -> Row:
    row = change(row)
    name = row.columns.get(CHOOSES)
    if len(environments.names) > 1 and name not in environments.names:
        raise ValueError(
            f"{row.where}: column {CHOOSES!r} must name one of {', '.join(environments.names)}, because "
            f"environment.path has several, got {name!r}"
        )
    if column not in row.columns:
        return row
    try:
        content = messages_of(row.columns[column])
    except ChatError as error:
        raise ValueError(f"{row.where}: column {column!r} {error}") from None
    if isinstance(content, str):
        raise ValueError(
            f"{row.where}: the prompt is plain text, but environments answer in chat messages: write it as "
            f'[{{"role": "user", "content": ...}}]'
        )
    tools = list(environments.tools(environments.name_for(row.columns)))
    columns = {**row.columns, column: conversation.told_tools(content, tools)}
    return replace(row, columns={**columns, TOOLS: tools if conversation.writes_tools else []})


def describe_environments(
    config: Config, environments: Environments, prompts: Sequence[Prompt]
) -> Iterator[str]:
    """What `rlhf check` says of them."""
    for name in environments.names:
        tools = [cast(str, tool["function"]["name"]) for tool in environments.tools(name)]
        how = f"tools {', '.join(tools)}" if tools else "answers in its own words"
        count = sum(environments.name_for(prompt.columns) == name for prompt in prompts)
        yield f"environment  {name}: {how}; {count} prompts; at most {config.environment.max_turns} turns"
