"""Steps of completions: where a step ends, and whether training will read its text as the same tokens.

A pair is written as text, and a run makes tokens of it again. `ReadBack` does the same as `rlhf/data` does,
so that only what comes back token for token is written: the prompt, with the common path behind it, as one
text; each step as a completion, tokenised apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.models.chat import encode_texts
from rlhf.models.pretrained import decoded


def step_length(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], delimiter: re.Pattern[str], parts: int
) -> int:
    """How many of the tokens are the first step: those up to the end of its last part.

    A part ends with a match of `delimiter`, without the white space at its end, which many tokenizers put
    into the token of the next word. A step ends with a token: one that goes on behind the delimiter belongs
    to it whole. All tokens, where the text has fewer than `parts` parts.
    """
    text = decoded(tokenizer, token_ids, frozenset())
    found = next(islice(delimiter.finditer(text), parts - 1, None), None)
    if found is None:
        return len(token_ids)
    end = found.start() + (len(found[0].rstrip()) or len(found[0]))
    lengths = (len(decoded(tokenizer, token_ids[:n], frozenset())) for n in range(1, len(token_ids)))
    return next((n for n, length in enumerate(lengths, start=1) if length >= end), len(token_ids))


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Texts of tokens, where these texts are read as the same tokens."""

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: Collection[int]

    def prompt(self, token_ids: Sequence[int]) -> str | None:
        """The text of a prompt, special tokens included; None: it would be read otherwise."""
        text = decoded(self.tokenizer, token_ids, frozenset())
        [ids] = encode_texts(self.tokenizer, [text])
        return text if ids == list(token_ids) else None

    def completion(self, token_ids: Sequence[int]) -> str | None:
        """The text of a step, without an end-of-sequence token at its end, which the reader puts there.

        None: it would be read otherwise, or there is no text.
        """
        ended = token_ids[-1] in self.end_token_ids
        if ended and token_ids[-1] != self.tokenizer.eos_token_id:
            return None
        own = list(token_ids[:-1] if ended else token_ids)
        text = decoded(self.tokenizer, own, frozenset())
        if not text:
            return None
        ids: list[int] = cast(Any, self.tokenizer)(text, add_special_tokens=False)["input_ids"]
        return text if ids == own else None
