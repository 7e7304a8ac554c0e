"""Calls each reward function once before the run, with an empty completion and with one that may be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.config.section import ConfigError
from rlhf.inputs import Inputs
from rlhf.rewards.workers.batch import BatchScores
from rlhf.rewards.workers.pool import RewardError
from rlhf.rewards.workers.return_values import summed
from rlhf.types import Completion, FinishReason, Prompt

ANSWERS = ("completion", "response", "solution", "answer", "ground_truth", "target", "label")
"""Columns that may hold what a right completion says, the likeliest first."""
GUESS = "The answer is 42."
STOP = FinishReason.STOP
MANY = 10**9
"""Samples of a step in which a few failures are no reason to stop."""
SHOWN = 40
"""Letters of a completion that are shown."""


def try_rewards(inputs: Inputs) -> Iterator[str]:
    """Lines of `rlhf check`: what each reward function gives for the first prompt.

    A function that fails on both completions is a warning. Raises ConfigError when a function returns what is
    no list of rewards, which a run would stop at in its first step.
    """
    rewards = inputs.rewards
    if not rewards.pools or inputs.environments is not None:
        return
    prompt = inputs.train.prompts[0]
    texts = ("", likely_answer(prompt))
    tokenizer: Any = inputs.tokenizer
    completions = [
        Completion(
            prompt.id, i, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), None, STOP, ()
        )
        for i, text in enumerate(texts)
    ]
    try:
        with rewards.without_judge():
            scoring = rewards.submit(
                [prompt], [completions], [texts], trainer_state={"global_step": 0}, step_samples=MANY
            )
            scoring.wait()
    except RewardError as error:
        raise ConfigError(str(error)) from None
    answer = texts[1] if len(texts[1]) <= SHOWN else f"{texts[1][:SHOWN]}..."
    for pool, scores in zip(rewards.pools, scoring.by_function, strict=True):
        empty, likely = (_given(scores, i) for i in range(2))
        yield f"reward       {pool.name}: {empty} for an empty completion, {likely} for {answer!r}"
        if len({i for i, _ in scores.failures}) == len(texts):
            yield (
                f"warning      {pool.called} failed on both: {scores.failures[-1][1].message}"
                f"{_hint(prompt, scores)}"
            )


def likely_answer(prompt: Prompt) -> str:
    """What a right completion may say: the text or number of a column that has answers, else a guess."""
    columns = prompt.columns
    found = (columns[name] for name in ANSWERS if isinstance(columns.get(name), str | int | float))
    return str(next(found, GUESS))


def _given(scores: BatchScores, sample: int) -> str:
    found = scores.scores[sample]
    if not found:
        return "no reward"
    values = {name: summed(value) for name, value in found.items()}
    alone = len(values) == 1
    return ", ".join(f"{value:g}" if alone else f"{name} {value:g}" for name, value in values.items())


def _hint(prompt: Prompt, scores: BatchScores) -> str:
    """What the error of a function that takes texts for messages, or messages for texts, comes from."""
    message = scores.failures[-1][1].message
    if isinstance(prompt.content, str) and "string indices" in message:
        return "; prompts of plain text have completions of plain text, not messages"
    if not isinstance(prompt.content, str) and ("expected string" in message or "'list' object" in message):
        return (
            "; prompts of chat messages have completions of messages: completion[-1]['content'] is the text"
        )
    return ""
