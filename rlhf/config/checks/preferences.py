"""Checks of preference algorithms and judges: what pairs need, and that a judge's answers are used."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algos.algorithm import Algorithm
from rlhf.config.pairs import PairsConfig
from rlhf.config.run import Config


def preference_problems(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """A line for each problem."""
    yield from _pairs(config, algorithm)
    yield from _judge(config, algorithm)


def _pairs(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """What pairs need, and what the settings of pairs are for."""
    data, name, preference = config.data, config.algorithm["name"], algorithm.preference
    compares = preference is not None or algorithm.selection.own_only
    if not compares and config.pairs != PairsConfig():
        yield f"the section pairs is for preference algorithms such as dpo, but algorithm.name is {name}"
    if preference is not None:
        if data.mix and data.reward_column is not None and config.pairs.rule != "of_data":
            yield (
                f"data.mix puts the data's completions beside rollouts, and {name} would compare their "
                "labels (1 for chosen, 0 for rejected) with rewards: set data.reward_column to null, so that "
                "reward.functions score both"
            )
        if data.mode == "online" and config.rollout.group_size < 2:
            yield (
                f"rollout.group_size is {config.rollout.group_size}, but {name} compares completions of a "
                "prompt: it needs two or more"
            )
        sampled = data.mode == "online" and config.pairs.rule in ("all", "dno_prct")
        compared = config.rollout.group_size if sampled else 2
        needed = data.max_prompt_tokens + compared * config.rollout.max_completion_tokens
        if config.model.packing in ("packed", "padded"):
            needed = compared * (data.max_prompt_tokens + config.rollout.max_completion_tokens)
        if config.learner.microbatch_tokens < needed:
            yield (
                f"learner.microbatch_tokens is {config.learner.microbatch_tokens}, but {name} needs the "
                f"{compared} completions that it compares in one pass, with their prompt up to {needed} "
                "tokens: raise it, or lower data.max_prompt_tokens or rollout.max_completion_tokens"
            )


def _judge(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """What a judge of pairs needs, and that its answers are used."""
    data, reward = config.data, config.reward
    if reward.preference is None:
        if config.pairs.labels == "preference" and data.mode == "online":
            yield "pairs.labels is preference, but there is no judge: set reward.preference, or another label"
        return
    if data.mode == "offline" or data.mix:
        setting = "data.mode = offline" if data.mode == "offline" else "data.mix"
        yield f"reward.preference compares completions that are sampled together, but {setting} is set"
    if config.rollout.group_size < 2:
        yield (
            f"rollout.group_size is {config.rollout.group_size}, but reward.preference compares completions "
            "of a prompt: it needs two or more"
        )
    if config.budget.rule != "uniform":
        yield (
            f"budget.rule is {config.budget.rule}, which goes by correct completions, and samples in parts "
            "that reward.preference could not compare: set it to uniform"
        )
    if not reward.functions:
        if reward.constraints or reward.success_objective is not None:
            yield (
                "reward.constraints and reward.success_objective are of reward functions, but the reward is "
                "a win rate: its mean over a group is always about 1/2"
            )
    elif problem := beside_judge(config, algorithm, "reward.functions"):
        yield problem


def beside_judge(config: Config, algorithm: Algorithm, rewards: str) -> str | None:
    """What is wrong where `rewards`, so called, give the rewards, so that a judge only labels pairs."""
    if algorithm.preference is None and not algorithm.selection.own_only:
        return (
            f"reward.preference beside {rewards} only labels pairs, and {config.algorithm['name']} has none: "
            "leave one of the two out"
        )
    if algorithm.preference and config.pairs.labels != "preference" and ":" not in config.pairs.rule:
        return (
            f"reward.preference beside {rewards} only labels pairs, but pairs.labels is "
            f"{config.pairs.labels}: set it to preference, or leave one of the two out"
        )
    return None
