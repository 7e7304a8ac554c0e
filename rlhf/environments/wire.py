"""Replies, endings and losses as JSON: what a worker writes and the trainer reads.

The trainer reads JSON only, because the code of an environment shares the process and could have written the
bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from rlhf.environments.observations import WrongAnswer
from rlhf.environments.protocol import Ending, Lost, Message, Reply

LONGEST_ANSWER = 12 << 20
"""Bytes of one answer, images included; a longer one costs the episode."""

Outcome = Reply | Ending | Lost
TYPES: Mapping[str, type[Reply] | type[Ending] | type[Lost]] = {
    "reply": Reply,
    "ending": Ending,
    "lost": Lost,
}


def written(call: int, outcome: Outcome, who: str) -> bytes:
    """A line with the outcome of a call. Raises WrongAnswer when it is too long."""
    ((kind, _),) = [(k, t) for k, t in TYPES.items() if isinstance(outcome, t)]
    line = json.dumps({"call": call, kind: asdict(outcome)}, default=_bytes).encode() + b"\n"
    if len(line) > LONGEST_ANSWER:
        raise WrongAnswer(
            f"{who} answered with {len(line) / 2**20:.0f} MiB, "
            f"more than the {LONGEST_ANSWER >> 20} MiB allowed"
        )
    return line


def read(answer: Mapping[str, Any], expected: type[Reply] | type[Ending]) -> Outcome:
    """The outcome in an answer. Raises an exception if it is neither of the `expected` type nor `Lost`."""
    for kind, made in TYPES.items():
        if kind in answer and made in (expected, Lost):
            fields = dict(cast(Mapping[str, Any], answer[kind]))
            if made is Reply:
                fields["messages"] = tuple(_message(message) for message in fields["messages"])
            return made(**fields)
    raise ValueError("no outcome")


def _bytes(value: object) -> str:
    if not isinstance(value, bytes):
        raise WrongAnswer(f"messages must hold what JSON can hold, got {type(value).__name__} {value!r:.80}")
    return base64.b64encode(value).decode()


def _message(message: Mapping[str, Any]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [_part(part) for part in cast(Sequence[Mapping[str, Any]], content)]}


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**part, "image": base64.b64decode(part["image"])} if part["type"] == "image" else part
