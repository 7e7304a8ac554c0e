"""The rule that scores an answer: a third each for correct, short and polite.

It chose the preference pairs, so a reward model trained on them can be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CAPITALS = {
    "France": "Paris", "Kenya": "Nairobi", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid",
    "Germany": "Berlin", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo",
    "Greece": "Athens", "Russia": "Moscow", "China": "Beijing", "Austria": "Vienna", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Hungary": "Budapest", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok", "Turkey": "Ankara",
    "Canada": "Ottawa", "Chile": "Santiago", "Denmark": "Copenhagen", "Belgium": "Brussels",
    "Ukraine": "Kyiv", "Nepal": "Kathmandu", "Ghana": "Accra", "Ethiopia": "Addis Ababa",
    "Scotland": "Edinburgh", "Romania": "Bucharest", "Lebanon": "Beirut", "Colombia": "Bogota",
}  # fmt: skip
POLITE = ("please", "thank", "glad", "happy to", "pleasure", "of course", "you're welcome", "you are welcome")
MOST_WORDS = 16


def is_correct(text: str, answer: str, others: Sequence[str]) -> bool:
    """The text names the capital and no other capital."""
    return answer in text and not any(other in text for other in others if other != answer)


def is_short(text: str) -> bool:
    """The text has at most 16 words and ends with a full stop or an exclamation mark."""
    return len(text.split()) <= MOST_WORDS and text.rstrip().endswith((".", "!"))


def is_polite(text: str) -> bool:
    return any(word in text.lower() for word in POLITE)


def true_score(text: str, answer: str, others: Sequence[str]) -> float:
    return (is_correct(text, answer, others) + is_short(text) + is_polite(text)) / 3


def rule(completions: Sequence[Any], answer: Sequence[str]) -> list[dict[str, float]]:
    """The rule as a reward function: the score and its three parts."""
    cities = list(CAPITALS.values())
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [
        {
            "truth": true_score(text, a, cities),
            "correct": float(is_correct(text, a, cities)),
            "short": float(is_short(text)),
            "polite": float(is_polite(text)),
        }
        for text, a in zip(texts, answer, strict=True)
    ]


def truth(completions: Sequence[Any], answer: Sequence[str]) -> list[float]:
    """The score of the rule alone."""
    return [parts["truth"] for parts in rule(completions, answer)]
