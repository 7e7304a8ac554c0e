"""Environments of the tests of whole runs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


class Unrated:
    """Repeats the last three letters of a turn, and gives no reward.

    A turn that begins with one of `ends` ends the episode.
    """

    def __init__(self, ends: str = "b") -> None:
        self.ends = ends

    def reset(self, seed: int, **columns: Any) -> str:
        self.greeting = random.Random(seed).choice("xyz")
        self.heard = ""
        return self.greeting

    def respond(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]] | None:
        said = messages[-1]["content"]
        self.heard += said
        return None if said.startswith(tuple(self.ends)) else [{"role": "user", "content": said[-3:]}]


class Echo(Unrated):
    """Its reward is the share of the letter a in all turns."""

    def get_reward(self) -> float:
        return self.heard.count("a") / max(1, len(self.heard))


class Fragile(Echo):
    """As `Echo`, but a turn that begins with c to f breaks it."""

    def respond(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]] | None:
        if messages[-1]["content"][:1] in "cdef":
            raise RuntimeError("it broke")
        return super().respond(messages)


def heard(completions: list[list[dict[str, Any]]], environments: list[Any], **_: Any) -> list[float]:
    """A reward function of episodes: how many turns there were, if the environment says the same."""
    turns = [sum(m["role"] == "assistant" for m in messages) for messages in completions]
    assert all(len(e.greeting) == 1 for e in environments)
    return [float(n) for n in turns]


class Shows(Echo):
    """As `Echo`, but answers with a picture of 24 by 16 pixels, whose grey says how much was heard."""

    def respond(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        if super().respond(messages) is None:
            return None
        picture = Image.new("L", (24, 16), 40 * len(self.heard) % 256)
        return [{"role": "user", "content": [{"type": "image", "image": picture}]}]


def brief(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """A reward function of episodes: how short the first turn was."""
    return [1.0 / (1 + len(messages[0]["content"])) for messages in completions]


def longer(completions: list[list[list[dict[str, Any]]]]) -> list[float]:
    """A judge of episodes: the one in which the policy said more letters is better."""
    sizes = [[spoken(messages) for messages in pair] for pair in completions]
    return [0.5 if a == b else float(a > b) for a, b in sizes]


def spoken(messages: list[dict[str, Any]]) -> int:
    """Letters of the policy, whose turns have what it observed between them."""
    assert len(messages) % 2 and all(m["role"] == "user" for m in messages[1::2])
    return sum(len(m["content"]) for m in messages[::2])
