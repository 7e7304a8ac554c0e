"""Whether the last message says the right number, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def right(completions: Sequence[Sequence[Mapping[str, Any]]], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for the number alone as the last word of an episode, else 0."""
    last = [messages[-1] for messages in completions]
    return [
        float(message["role"] == "assistant" and message["content"].strip() == wanted)
        for message, wanted in zip(last, answer, strict=True)
    ]
