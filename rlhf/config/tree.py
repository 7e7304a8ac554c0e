"""The section `tree`: how `rlhf pairs tree` searches for pairs (docs/pairs_tree.md)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rlhf.config.section import Positive, Section, Share


class TreeConfig(Section):
    """The tree search of `rlhf pairs tree` (iTool, arXiv:2501.09766); training does not use it."""

    prompts: Positive | None = None
    """Number of prompts of `data.train` that are searched, from the first one on; not given: all."""
    iterations: Positive = 5
    """Steps that are expanded in each tree, one after the other."""
    actions: Annotated[int, Field(ge=2)] = 3
    """Next steps that are sampled where the tree grows."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.5
    """Temperature of these samples; that of the rollouts behind them is `rollout.temperature`."""
    delimiter: str = r"\. |, |=|\("
    """Regular expression of what ends a part of a step."""
    step_parts: Positive = 2
    """Parts of a step."""
    step_tokens: Positive = 50
    """Most tokens of a step that is not the last one."""
    depth: Positive = 3
    """Steps from the prompt to the bottom of the tree; the last one is all the rest of the turn."""
    rollouts: Positive = 2
    """Completions that are sampled behind a new step; their mean reward is its value."""
    exploration: Annotated[float, Field(ge=0.0)] = 1.0
    """The weight c of rarely visited steps, where the search decides which step to expand."""
    evaluator: Literal["rewards", "self"] = "rewards"
    """What values a completion. `rewards`: the reward functions, or the environment's reward. `self`: the
    model is asked how good it is, from A to D (needs `gold_column`)."""
    gold_column: str | None = None
    """Column of the right answer. With it a new step gets a reward for words that it shares with that
    answer; not given: it gets none."""
    end_marker: str = ")]"
    """Text that ends the call: a new step that has it, or lacks it, as the right answer does gets 0.1, any
    other -0.1. For `gold_column`."""
    min_gap: Annotated[float, Field(ge=0.0)] = 0.1
    """The best and the worst next step are a pair if their values differ by at least this."""
    max_overlap: Share = 0.95
    """Share of the words of the shorter one of them, at most, that the other one has too."""
    min_best: float = -0.3
    """Value that the better one of them has at least."""

    @field_validator("delimiter")
    @classmethod
    def is_an_expression(cls, given: str) -> str:
        try:
            matches_nothing = re.compile(given).match("") is not None
        except re.error as error:
            raise ValueError(f"must be a regular expression, got {given!r}: {error}") from None
        if matches_nothing:
            raise ValueError(f"must not match the empty text, got {given!r}")
        return given
