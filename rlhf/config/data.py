"""The sections `data`, `prompt_value` and `replay`: prompts and completions that a run learns from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf.config.section import Count, Positive, Section


class DataConfig(Section):
    """Datasets to train and evaluate on, and whether completions are sampled or come from the dataset."""

    train: str
    """Prompts to train on, or with `mode: offline` completions: a jsonl (also .jsonl.gz or .jsonl.zst),
    parquet or csv file, a `datasets` folder, a dataset of the Hugging Face hub as `OWNER/NAME:SPLIT` or
    `OWNER/NAME/CONFIG:SPLIT`, or `gym:TASK?setting=value` for a task of reasoning-gym."""
    eval: str | None = None
    """Held-out prompts, in one of the same forms, or for a preference algorithm held-out pairs; not given:
    there are no evaluations."""
    mode: Literal["online", "offline", "offline_to_online"] = "online"
    """Where completions come from. `online`: the policy samples them. `offline`: the dataset has them.
    `offline_to_online`: both, as `offline_steps` and `mix` say."""
    completion_column: str | None = None
    """Column of the dataset's completions (not for `online`); not given: `response` where there is one, else
    `completion`."""
    reward_column: str | None = "reward"
    """Column of the rewards of the dataset's completions (not for `online`); null: `reward.functions` score
    them once, before the first step."""
    sampling: Literal["groups", "completions", "positive", "priority"] = "groups"
    """What a step draws from the dataset's completions. `groups`: `rollout.prompts_per_step` prompts, each
    with all its completions. The others draw that many times `rollout.group_size` completions one by one:
    `completions` from all, `positive` from those with an advantage above 0, `priority` from the same, with a
    probability in proportion to the advantage."""
    together_column: str | None = None
    """Column of the dataset whose lines of one value are learned from in one step (with `sampling: groups`):
    counterfactuals, for example. Each value must have equally many lines."""
    offline_steps: Count = 0
    """For `offline_to_online`: the first so many steps learn from the dataset alone, the others from
    rollouts."""
    mix: bool = False
    """For `offline_to_online`: to each group of rollouts the dataset's completions of its prompt are
    added."""
    curriculum: Literal["none", "easy_to_hard"] = "none"
    """Which prompts rollouts are sampled for. `none`: each once in an epoch, in random order. `easy_to_hard`:
    at random, those with a high measured success rate more often at the start of the run, those with a low
    one at its end (docs/knapsack.md). A prompt that was never sampled counts as solved half of the time."""
    precompute_reference: bool = False
    """For `offline`: the reference's log-probs of all completions are computed once, before the first step,
    and kept by checkpoints; then the reference model is given up."""
    improve_prompt: str | None = None
    """What asks for a better answer, behind a first one: a message of the user, or behind a prompt of text
    the text itself. For `srpo`, `improve_column`, and `rlhf eval --revise`."""
    improve_column: str | None = None
    """Column with an answer that the policy is to improve (PIT): every prompt goes on with it and with
    `improve_prompt`. Rewards see the prompt without these two, and the answer as `reference`."""
    reference_column: str = "teacher"
    """Column that says which of several models in `model.reference` a line is compared with, by its name."""
    prompt_column: str = "prompt"
    """Column of the prompts: plain text, or a list of chat messages. All further columns are passed to the
    reward functions."""
    image_column: str | None = "images"
    """Column of images that the messages themselves do not hold (docs/papo.md); a dataset may lack it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for prompts and turns: `{enable_thinking: false}` for Qwen3. The model
    is exported with them."""
    max_prompt_tokens: Positive = 1024
    """Most tokens of a prompt, chat template included."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """What happens to longer prompts. `refuse`: the run does not start. `skip`: they are left out and
    counted."""


class PromptValueConfig(Section):
    """The frozen value of a prompt: the reward to expect of its completions, from a small head that is fitted
    before the first step. For algorithms that compare rewards with it: `a_lol` and its variants, and a
    `baseline` of prompt_value (rlhf/learn/prompt_value.py). `epochs`, `lr` and `max_prompts` also hold for
    the head that picks the temperatures of `awr` with a `divergence`."""

    targets: Literal["greedy", "data"] = "greedy"
    """What the head is fitted to. `greedy`: the reward of one greedy completion of each prompt. `data`: the
    mean reward of the dataset's completions of the prompt."""
    epochs: Positive = 10
    """Passes over the prompts; the head of the pass with the lowest error is kept."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Learning rate of the head's Adam. The default is that of the paper's largest run; with few prompts a
    higher one is needed."""
    max_value: Annotated[float, Field(gt=0.0)] = 1.0
    """Upper bound of a value, the lower one is 0: set it to the largest reward there can be."""
    max_prompts: Positive = 1024
    """Most prompts that the head is fitted to; of a larger dataset a random part is taken."""


class ReplayConfig(Section):
    """Rollouts of earlier steps that are learned from again (rlhf/collect/replay.py)."""

    groups_per_step: Count = 0
    """Groups of earlier steps that are added to each step, over all ranks; 0: none."""
    max_age: Positive = 4
    """Largest age of a group that is replayed: how many steps ago its oldest token was sampled."""
