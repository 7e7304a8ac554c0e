"""Sentences of an answer, where one is cut, and yes for no."""

from __future__ import annotations

import random
import re

_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?]+(?=\s)|$)", re.DOTALL)
_WORD = re.compile(r"\s*\S+")
_YES_OR_NO = re.compile(r"^\s*(Yes|yes|No|no)\b")
_OTHER = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def sentences_of(text: str) -> list[str]:
    """The sentences, each with the white space before it; joined they are the text, but for its end's.

    >>> sentences_of("It is red. Is it? Yes.")
    ['It is red.', ' Is it?', ' Yes.']
    """
    return _SENTENCE.findall(text.rstrip())


def exchange_yes_and_no(sentence: str) -> str:
    """A sentence that begins with yes or no, with the other of the two; any other sentence as it is."""
    found = _YES_OR_NO.match(sentence)
    if found is None:
        return sentence
    start, end = found.span(1)
    return sentence[:start] + _OTHER[found[1]] + sentence[end:]


def beginning(sentence: str, rng: random.Random) -> str:
    """The first words of a sentence, from none to all but one, each number with the same probability."""
    words = _WORD.findall(sentence)
    return "".join(words[: rng.randrange(len(words))])


def ends_sentence(text: str) -> bool:
    """Whether a piece of text ends with a full stop or its like."""
    return text.rstrip().endswith((".", "!", "?"))
