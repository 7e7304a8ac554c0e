"""The reward of the words task: how many of the given words a completion uses, and whether it ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def words_used(completions: Sequence[Any], words: Sequence[Sequence[str]]) -> list[float]:
    """The share of `words` that is in the completion, halved where it does not end like a sentence."""
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [one(text, wanted) for text, wanted in zip(texts, words, strict=True)]


def one(text: str, words: Sequence[str]) -> float:
    """`one("A lamp by the river.", ["river", "lamp", "gold", "moon"]) == 0.5`."""
    used = set(re.findall(r"[a-z]+", text.lower()))
    share = sum(word in used for word in words) / len(words)
    return share if text.rstrip().endswith((".", "!", "?")) else share / 2
