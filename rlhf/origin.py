"""Settings that say where completions come from, and what of them cannot work together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rlhf.algos.algorithm import Algorithm
from rlhf.settings import Count, Positive, Section

if TYPE_CHECKING:
    from rlhf.config import Config


class DataConfig(Section):
    train: str
    """jsonl or parquet file, a `datasets` folder, or `gym:TASK?setting=value` of reasoning-gym."""
    eval: str | None = None
    """Held-out prompts, in any of these forms; without them nothing is evaluated."""
    mode: Literal["online", "offline", "offline_to_online"] = "online"
    """Learn from rollouts, from completions that the dataset has, or from these and then from rollouts."""
    completion_column: str | None = None
    """With completions in the data; not given: `response` where there is one, else `completion`."""
    reward_column: str | None = "reward"
    """With completions in the data; null: `reward.functions` score them, once, before the first step."""
    sampling: Literal["groups", "completions", "positive", "priority"] = "groups"
    """How a step draws from data: `rollout.prompts_per_step` prompts with all their completions; or that many
    times `rollout.group_size` completions one by one: all, those with an advantage above 0 only, or these
    with a probability in proportion to it."""
    offline_steps: Count = 0
    """With `offline_to_online`: how many steps learn from the data before the first rollouts."""
    mix: bool = False
    """With `offline_to_online`: the data's completions of a prompt join its rollouts."""
    prompt_column: str = "prompt"
    """Holds plain text, or a list of chat messages; the other columns are given to rewards."""
    image_column: str | None = "images"
    """Where pictures stand that are not in the messages themselves (docs/papo.md); it may be missing."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt that is taken, chat template included."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """What to do with longer ones: refuse the run, or leave them out and count them."""


class PromptValueConfig(Section):
    """For algorithms that compare a reward with the frozen value of its prompt (rlhf/prompt_value.py)."""

    targets: Literal["greedy", "data"] = "greedy"
    """What it is learned from: the reward of one greedy completion a prompt, or the data's mean reward."""
    epochs: Positive = 10
    """Passes over these rewards; the one with the lowest error counts."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Learning rate of the head: that of the paper's largest run; a small set of data needs more."""
    max_value: Annotated[float, Field(gt=0.0)] = 1.0
    """Rewards are between 0 and this."""
    max_prompts: Positive = 1024
    """How many prompts it is learned from, at most."""


class ReplayConfig(Section):
    groups_per_step: Count = 0
    """Groups of earlier steps that each step learns from again; 0: none are kept."""
    max_age: Positive = 4
    """Of a group's oldest token, in updates of the policy."""


def check_origin(config: Config, algorithm: Algorithm) -> None:
    """Raises ValueError, a line a problem."""
    problems = [
        *_rewards(config, algorithm),
        *(_without_data(config, algorithm) if config.data.mode == "online" else _data(config, algorithm)),
        *_replay(config, algorithm),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _rewards(config: Config, algorithm: Algorithm) -> Iterator[str]:
    if config.reward.functions:
        return
    data = config.data
    if data.mode != "offline":
        yield f"reward.functions is empty, but with data.mode = {data.mode} there are rollouts to score"
    elif data.reward_column is None:
        yield "reward.functions is empty and data.reward_column is null: nothing gives completions a reward"
    if data.eval is not None:
        yield f"reward.functions is empty, but data.eval = {data.eval} is evaluated by them"
    if algorithm.needs_prompt_value and config.prompt_value.targets == "greedy":
        yield (
            "reward.functions is empty, but prompt_value.targets = greedy scores completions with them; "
            "give some, or learn the values from the data's rewards: prompt_value.targets = data"
        )


def _without_data(config: Config, algorithm: Algorithm) -> Iterator[str]:
    for key, default in (("sampling", "groups"), ("offline_steps", 0), ("mix", False)):
        value = config.data.model_dump()[key]
        if value != default:
            yield f"data.{key} is {value}, but data.mode is online: there is no data to draw from"
    if config.prompt_value.targets == "data":
        yield "prompt_value.targets is data, but data.mode is online: the data has no rewards"
    if algorithm.balance is not None:
        yield "algorithm.divergence is picked by the data's rewards, but data.mode is online"


def _data(config: Config, algorithm: Algorithm) -> Iterator[str]:
    data, name = config.data, config.algorithm["name"]
    offline = data.mode == "offline"
    if offline and algorithm.mismatch.kind != "none":
        yield (
            f"algorithm.mismatch.kind is {algorithm.mismatch.kind}, but nobody recorded the log-probs of the "
            "data's completions, so no mismatch can be corrected: set it to none"
        )
    if (offline or data.offline_steps or data.mix) and not algorithm.imitates:
        yield (
            f"algorithm {name} compares the policy with the one that sampled, and nobody recorded the data's "
            "log-probs; learn from data with sft, best_of, awr, a_lol or one of their relatives"
        )
    if data.sampling != "groups" and not algorithm.pointwise:
        yield (
            f"data.sampling is {data.sampling}, which draws completions one by one, but {name} compares "
            "those of a group; set it to groups, or take a baseline that is none or prompt_value"
        )
    if offline and (data.offline_steps or data.mix):
        yield "data.offline_steps and data.mix are for data.mode = offline_to_online"
    if not offline and not data.offline_steps and not data.mix:
        yield "data.mode is offline_to_online: set data.offline_steps, data.mix or both"
    if data.offline_steps > config.steps:
        yield f"data.offline_steps is {data.offline_steps}, but the run has {config.steps} steps"
    if offline and config.rollout.ahead:
        yield "rollout.ahead samples the next batch before an update, but data.mode = offline samples none"
    if offline and config.budget.rule != "uniform":
        yield f"budget.rule is {config.budget.rule}, but data.mode = offline has no rollouts to share out"


def _replay(config: Config, algorithm: Algorithm) -> Iterator[str]:
    if not config.replay.groups_per_step:
        return
    if config.data.mode == "offline":
        yield "replay.groups_per_step is for rollouts, but data.mode is offline"
    if config.rollout.ahead:
        yield "replay.groups_per_step learns from old tokens, which rollout.ahead takes out of the loss"
    if algorithm.mismatch.kind == "none" and not algorithm.imitates:
        yield (
            "replay.groups_per_step needs algorithm.mismatch.kind: without it, tokens of older policies "
            "count as the policy's own; token_tis is the usual one"
        )
