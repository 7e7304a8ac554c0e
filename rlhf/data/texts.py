"""Reads the texts of `ptx` (pretraining loss beside RL): whole texts, or completions of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.config.learner import PtxConfig
from rlhf.data.completions import completion_ids
from rlhf.data.prompts import load_prompts


@dataclass(frozen=True, slots=True)
class Text:
    """`given` tokens are context only, `learned` tokens are predicted; both have at least one token."""

    given: tuple[int, ...]
    learned: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.given) + len(self.learned)


def load_texts(section: PtxConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Text]:
    """Reads and tokenises the texts.

    Raises ValueError, with file and line, when a column is missing, or a text is empty or has more than
    `max_tokens` tokens.
    """
    assert section.path is not None
    plain = section.kind == "text"
    rows = load_prompts(
        Path(section.path).expanduser(),
        tokenizer,
        prompt_column="text" if plain else "prompt",
        max_prompt_tokens=max_tokens,
    )
    if not plain and "completion" not in rows.columns:
        raise ValueError(f"{section.path}: ptx.kind completions needs a column completion beside the prompt")
    texts: list[Text] = []
    for row in rows.prompts:
        if plain:
            text = Text(row.token_ids[:1], row.token_ids[1:])
        else:
            text = Text(row.token_ids, completion_ids(tokenizer, str(row.columns["completion"])))
        if not text.learned or text.tokens > max_tokens:
            raise ValueError(
                f"{section.path}, {row.id}: a text must have 2 to {max_tokens} tokens "
                f"(learner.microbatch_tokens), got {text.tokens}"
            )
        texts.append(text)
    return texts
