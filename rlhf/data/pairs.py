"""Reads data for reward models: preference pairs or ratings become tokenised examples, every line checked.

    pairs      {"prompt": ..., "chosen": ..., "rejected": ...}, as rlhf/data/preferences.py reads them
    ratings    {"prompt": ..., "completion": "text", "ratings": {"helpful": 4, "polite": null}}

A prompt is text or chat messages, as in every dataset. A completion is its text and the end-of-sequence
token, at which the score is read; a truncated text is therefore scored as one that ends too early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from rlhf.config.reward_model import PreferenceData, ScoreConfig
from rlhf.data.completions import completion_ids
from rlhf.data.pair_prompts import with_prompt
from rlhf.data.preferences import completion_text
from rlhf.data.prompts import load_prompts
from rlhf.types import Prompt


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with a chosen and a rejected completion, or with one completion and its ratings."""

    prompt: Prompt
    texts: tuple[str, ...]
    completions: tuple[tuple[int, ...], ...]
    """Token ids, the end-of-sequence token last."""
    ratings: tuple[float, ...] = ()
    """One per objective, in the order of `score.objectives`; NaN for an objective that is not rated."""

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass: the prompt once, and each completion with one extra token at its end.

        The score is read from the state that would predict the extra token.
        """
        return len(self.prompt.token_ids) + sum(len(c) + 1 for c in self.completions)


def load_examples(
    path: str, data: PreferenceData, score: ScoreConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Reads, checks and tokenises all examples. Raises ValueError with file, line, column and reason."""
    prompts = load_prompts(
        Path(path).expanduser(),
        tokenizer,
        change=partial(with_prompt, column=data.prompt_column),
        prompt_column=data.prompt_column,
        max_prompt_tokens=data.max_prompt_tokens,
        long_prompts=data.long_prompts,
    )
    wanted = ("chosen", "rejected") if score.kind == "pairs" else ("completion", "ratings")
    missing = [name for name in wanted if name not in prompts.columns]
    if missing:
        raise ValueError(
            f"{path}: score.kind {score.kind} needs the columns {', '.join(wanted)} beside the prompt; "
            f"{', '.join(missing)} is missing, there are {', '.join(prompts.columns) or 'none'}"
        )
    examples = [_example(prompt, wanted, path, score, tokenizer) for prompt in prompts.prompts]
    limit = data.max_completion_tokens
    too_long = [e for e in examples if max(map(len, e.completions)) > limit]
    if too_long and (data.long_prompts == "refuse" or len(too_long) == len(examples)):
        longest = max(map(len, too_long[0].completions))
        raise ValueError(
            f"{path}, {too_long[0].prompt.id}: a completion of {longest} tokens is longer than "
            f"data.max_completion_tokens = {limit}; raise the limit or shorten it"
        )
    return [e for e in examples if e not in too_long]


def _example(
    prompt: Prompt,
    columns: Sequence[str],
    path: str,
    score: ScoreConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    where = f"{path}, {prompt.id}"
    names = columns if score.kind == "pairs" else columns[:1]
    texts: list[str] = []
    for name in names:
        texts.append(completion_text(where, name, prompt.columns[name]))
    if score.kind == "pairs" and texts[0] == texts[1]:
        raise ValueError(f"{where}: chosen and rejected are the same text, {texts[0]!r:.80}")
    completions = tuple(completion_ids(tokenizer, text) for text in texts)
    ratings = () if score.kind == "pairs" else _ratings(prompt.columns["ratings"], score.objectives, where)
    return Example(prompt, tuple(texts), completions, ratings)


def _ratings(value: object, objectives: Sequence[str], where: str) -> tuple[float, ...]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: ratings must be an object of numbers by objective, got {value!r:.80}")
    given = cast(Mapping[str, object], value)
    unknown = sorted(set(given) - set(objectives))
    if unknown:
        raise ValueError(
            f"{where}: ratings has {', '.join(unknown)}, which is not in score.objectives "
            f"({', '.join(objectives)})"
        )
    ratings: list[float] = []
    for name in objectives:
        rating = given.get(name)
        if rating is not None and not (isinstance(rating, int | float) and math.isfinite(rating)):
            raise ValueError(f"{where}: the rating of {name} must be a number or null, got {rating!r:.80}")
        ratings.append(math.nan if rating is None else float(rating))
    if all(map(math.isnan, ratings)):
        raise ValueError(f"{where}: none of the objectives is rated")
    return tuple(ratings)
