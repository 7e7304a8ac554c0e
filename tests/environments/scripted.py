"""Environments without processes: what they answer is written in a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.environments.protocol import Ending, Lost, Message, Reply

Answer = Callable[[str, Sequence[Message]], Reply | Lost]


def results(*texts: str) -> Reply:
    """Results of tools."""
    return Reply(tuple({"role": "tool", "name": "f", "content": text} for text in texts), calls=len(texts))


@dataclass
class Scripted:
    """`answer` gets the key of an episode and its messages; it is late by `delay(key, turn)` seconds."""

    answer: Answer
    begins: Callable[[str, Mapping[str, Any], int], Reply | Lost] = lambda key, columns, seed: Reply()
    ends: Callable[[str, Sequence[Message]], Ending | Lost] = lambda key, messages: Ending()
    delay: Callable[[str, int], float] = lambda key, turn: 0.0
    names: tuple[str, ...] = ("scripted",)
    gives_rewards: bool = False
    schemas: tuple[Mapping[str, Any], ...] = ()
    dropped: list[str] = field(default_factory=list[str])
    live: set[str] = field(default_factory=set[str])

    def tools(self, name: str) -> Sequence[Mapping[str, Any]]:
        return self.schemas

    def name_for(self, columns: Mapping[str, Any]) -> str:
        return columns.get("environment", self.names[0])

    def check_columns(self, columns: Sequence[str]) -> None:
        pass

    def print_to(self, path: Path) -> None:
        pass

    def begin(
        self,
        key: str,
        name: str,
        columns: Mapping[str, Any],
        seed: int,
        finish: Callable[[Reply | Lost], None],
    ) -> None:
        assert key not in self.live
        self.live.add(key)
        self._later(key, 0, self.begins(key, columns, seed), finish)

    def respond(self, key: str, messages: Sequence[Message], finish: Callable[[Reply | Lost], None]) -> None:
        assert key in self.live
        turn = sum(message["role"] == "assistant" for message in messages)
        self._later(key, turn, self.answer(key, messages), finish)

    def end(self, key: str, messages: Sequence[Message], finish: Callable[[Ending | Lost], None]) -> None:
        self.live.remove(key)
        finish(self.ends(key, messages))

    def drop(self, key: str) -> None:
        self.dropped.append(key)
        self.live.discard(key)

    def close(self) -> None:
        self.live.clear()

    def _later(self, key: str, turn: int, outcome: Reply | Lost, finish: Callable[[Any], None]) -> None:
        if isinstance(outcome, Lost):
            self.live.discard(key)
        seconds = self.delay(key, turn)
        if seconds:
            threading.Timer(seconds, finish, [outcome]).start()
        else:
            finish(outcome)
