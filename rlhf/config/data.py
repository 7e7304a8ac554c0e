"""The sections `data`, `prompt_value` and `replay`: where prompts and completions come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.section import Count, Positive, Section


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
