"""What a good answer is, as a rule: correct, short and polite, a third each.

It made the preference pairs, so it is the truth that a reward model of them can be held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

POLITE = ("please", "thank", "glad", "happy to", "pleasure", "of course", "you're welcome", "you are welcome")
MOST_WORDS = 16


def is_correct(text: str, answer: str, others: Sequence[str]) -> bool:
    """Names the capital and no other one."""
    return answer in text and not any(other in text for other in others if other != answer)


def is_short(text: str) -> bool:
    """At most 16 words, and an end."""
    return len(text.split()) <= MOST_WORDS and text.rstrip().endswith((".", "!"))


def is_polite(text: str) -> bool:
    return any(word in text.lower() for word in POLITE)


def true_score(text: str, answer: str, others: Sequence[str]) -> float:
    return (is_correct(text, answer, others) + is_short(text) + is_polite(text)) / 3


def rule(
    completions: Sequence[Any], answer: Sequence[str], others: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """As a reward function: the score and its three parts."""
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [
        {
            "truth": true_score(text, a, o),
            "correct": float(is_correct(text, a, o)),
            "short": float(is_short(text)),
            "polite": float(is_polite(text)),
        }
        for text, a, o in zip(texts, answer, others, strict=True)
    ]
