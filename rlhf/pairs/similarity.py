"""How alike two texts are: the cosine of their n-grams, or of the vectors of a function of the user's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.pairs.files import PairsError
from rlhf.plugins import load_plugin

Similarity = Callable[[str, str], float]
NGRAMS = "ngrams"


def load_similarity(spec: str) -> Similarity:
    """`ngrams`, or by the cosine of the vectors that a function `FILE.py:NAME` has for a list of texts.

    Raises ValueError: there is no such function.
    """
    if spec == NGRAMS:
        return ngram_similarity
    embed: Callable[[list[str]], Sequence[Sequence[float]]] = load_plugin(spec)

    def similarity(first: str, second: str) -> float:
        vectors: Any = embed([first, second])
        try:
            one, two = ([float(x) for x in vector] for vector in vectors)
            return cosine(dict(enumerate(one)), dict(enumerate(two)))
        except (TypeError, ValueError) as error:
            raise PairsError(
                f"--similarity: {spec} must return a vector of numbers for each of two texts ({error}), got "
                f"{vectors!r:.100}"
            ) from None

    return similarity


def ngram_similarity(first: str, second: str) -> float:
    """Cosine of the counts of words and of three characters in a row, whatever their case.

    It needs no model, and sees wording alone: a paraphrase is as unlike to it as an error.
    """
    return cosine(_ngrams(first), _ngrams(second))


def cosine(first: dict[Any, float], second: dict[Any, float]) -> float:
    """Cosine of two vectors, by their entries; 0 where one of them is zero."""
    product = sum(value * second.get(key, 0.0) for key, value in first.items())
    norms = math.sqrt(sum(v * v for v in first.values()) * sum(v * v for v in second.values()))
    return product / norms if norms else 0.0


def _ngrams(text: str) -> dict[Any, float]:
    words = text.lower().split()
    spaced = f" {' '.join(words)} "
    threes = (spaced[i : i + 3] for i in range(len(spaced) - 2))
    return dict(Counter([*((word,) for word in words), *threes]))
