"""Asks a pool of environments and waits for the answers."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf.config.environment import EnvironmentConfig
from rlhf.environments.pool import EnvironmentPool
from rlhf.environments.protocol import Ending, Lost, Message, Reply

PATIENCE = 150.0
"""Seconds after which a test fails because nothing is answered."""


class Answer:
    """What `finish` will be called with."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, outcome: Any) -> None:
        self.heard.put(outcome)

    def wait(self) -> Any:
        return self.heard.get(timeout=PATIENCE)


def start(
    pool: EnvironmentPool, key: str, name: str, seed: int = 0, columns: Mapping[str, Any] | None = None
) -> Answer:
    answer = Answer()
    pool.begin(key, name, columns or {}, seed, answer)
    return answer


def begin(
    pool: EnvironmentPool, key: str, name: str, seed: int = 0, columns: Mapping[str, Any] | None = None
) -> Reply | Lost:
    return start(pool, key, name, seed, columns).wait()


def start_turn(pool: EnvironmentPool, key: str, text: str) -> Answer:
    answer = Answer()
    pool.respond(key, conversation(text), answer)
    return answer


def turn(pool: EnvironmentPool, key: str, text: str) -> Reply | Lost:
    return start_turn(pool, key, text).wait()


def end(pool: EnvironmentPool, key: str) -> Ending | Lost:
    answer = Answer()
    pool.end(key, conversation("done"), answer)
    return answer.wait()


def conversation(text: str) -> Sequence[Message]:
    return [{"role": "user", "content": "Go."}, {"role": "assistant", "content": text}]


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def contents(reply: Reply | Lost) -> list[Any]:
    """The contents of the messages of a reply."""
    assert isinstance(reply, Reply), reply
    return [message["content"] for message in reply.messages]


@contextmanager
def pool_of(*paths: str, **settings: Any) -> Iterator[EnvironmentPool]:
    pool = EnvironmentPool(EnvironmentConfig(path=paths, **({"workers": 1, "timeout": PATIENCE} | settings)))
    try:
        yield pool
    finally:
        pool.close()
