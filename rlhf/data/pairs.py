"""Reads data for reward models: lines become tokenised examples, every one checked.

What columns a line has, and what they mean, says the kind of the scores (rlhf/reward_model/kinds/). A prompt
is text or chat messages, as in every dataset. A completion is its text and the end-of-sequence token, at
which the score is read; a truncated text is therefore scored as one that ends too early.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from rlhf.config.reward_model import PreferenceData
from rlhf.data.pair_prompts import with_prompt
from rlhf.data.prompts import load_prompts
from rlhf.models.vision.processor import Processor
from rlhf.types import Prompt


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with the completions that are scored together, and what the data says of them."""

    prompt: Prompt
    texts: tuple[str, ...]
    completions: tuple[tuple[int, ...], ...]
    """Token ids, the end-of-sequence token last."""
    labels: tuple[float, ...] = ()
    """Numbers whose meaning the kind has: a margin, a rating of each objective (NaN: none), ..."""
    places: tuple[tuple[int, ...], ...] = ()
    """Of each completion, the tokens at which scores are read; empty: at the last one of each."""

    @property
    def scored(self) -> tuple[tuple[int, ...], ...]:
        """`places`, with the default filled in."""
        return self.places or tuple((len(c) - 1,) for c in self.completions)

    @property
    def num_scored(self) -> int:
        """How many places are scored."""
        return sum(map(len, self.scored))

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass: the prompt once, and each completion with one extra token at its end.

        The score is read from the state that would predict the extra token.
        """
        return len(self.prompt.token_ids) + sum(len(c) + 1 for c in self.completions)


@runtime_checkable
class Reader(Protocol):
    """How a kind reads a line."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a line needs beside the prompt."""
        ...

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The example of a line, whose columns are in `prompt`; `where` names it in errors (ValueError)."""
        ...


def load_examples(
    path: str,
    data: PreferenceData,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor | None = None,
) -> list[Example]:
    """Reads, checks and tokenises all examples; `processor`: of a model that sees.

    Raises ValueError with file, line, column and reason.
    """
    prompts = load_prompts(
        Path(path).expanduser(),
        tokenizer,
        change=partial(with_prompt, column=data.prompt_column),
        prompt_column=data.prompt_column,
        image_column=data.image_column,
        processor=processor,
        max_prompt_tokens=data.max_prompt_tokens,
        long_prompts=data.long_prompts,
    )
    missing = [name for name in reader.columns if name not in prompts.columns]
    if missing:
        raise ValueError(
            f"{path}: score.kind needs the columns {', '.join(reader.columns)} beside the prompt; "
            f"{', '.join(missing)} is missing, there are {', '.join(prompts.columns) or 'none'}"
        )
    examples = [reader.example(prompt, f"{path}, {prompt.id}", tokenizer) for prompt in prompts.prompts]
    limit = data.max_completion_tokens
    too_long = [max(map(len, e.completions)) > limit for e in examples]
    if any(too_long) and (data.long_prompts == "refuse" or all(too_long)):
        first = examples[too_long.index(True)]
        raise ValueError(
            f"{path}, {first.prompt.id}: a completion of {max(map(len, first.completions))} tokens is longer "
            f"than data.max_completion_tokens = {limit}; raise the limit or shorten it"
        )
    return [e for e, long in zip(examples, too_long, strict=True) if not long]


def number_of(where: str, what: str, value: object) -> float:
    """A finite number of the data. Raises ValueError, which begins with `where`, for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{where}: {what} must be a number, got {value!r:.80}")
    return float(value)
