"""What the loop of an episode and the environments say to each other (rlhf/collect/episodes.py asks).

An episode is one sample of a prompt: the policy's turns and what its environment answers in between. It has a
key, unique among those that have begun and not ended. Every call returns at once; its outcome is handed to
`finish` later, from another thread, exactly once: what was asked for, or `Lost`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Message = Mapping[str, Any]
"""A chat message: `role` and `content`, a text or a list of parts; perhaps `tool_calls`, `name`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to `begin` or to a turn of the policy."""

    messages: tuple[Message, ...] = ()
    """New messages, which are put behind the conversation. None after a turn: the episode is over.

    Of `begin`, the text or the parts that `reset` returned are one message of the user, which belongs to the
    last message of the prompt (TRL appends it there). The parts of a content are `{"type": "text", "text":
    ...}` and `{"type": "image", "image": ...}`, the bytes of a PNG."""
    turn: Message | None = None
    """The policy's turn as a message: `content` without the calls of tools that were found in it, and these
    as `tool_calls`, `[{"type": "function", "function": {"name", "arguments"}}]`; None from `begin`."""
    calls: int = 0
    """Calls of tools in this turn that were carried out."""
    errors: int = 0
    """Those of them that raised an exception; the policy was told."""
    malformed: int = 0
    """Calls that could not be read, named no tool, or had arguments that do not fit; the policy was told."""
    truncated: int = 0
    """Texts in `messages` that were too long and have been cut, which they say at their end."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What an environment says of an episode that is over."""

    reward: float | Mapping[str, float] | None = None
    """The environment's own reward, or several by name; None: it has none."""
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The public attributes of the instance that JSON can hold, which reward functions get."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an episode cannot go on. It is not learned from, and never counts as a reward of 0."""

    kind: str
    """"timeout", "died", "memory", "exception" (of the environment itself, not of a tool) or "value"."""
    message: str
    """One sentence for people, with the name of the environment."""
    details: str = ""
    """The traceback of the user's code, or the last output of the process."""


@runtime_checkable
class Environments(Protocol):
    """The environments of a run, by name; rlhf/environments/pool.py has the one with processes."""

    @property
    def names(self) -> Sequence[str]:
        """Their names: those of the classes or functions."""
        ...

    @property
    def gives_rewards(self) -> bool:
        """Whether one of them has a reward of its own (`get_reward`)."""
        ...

    def tools(self, name: str) -> Sequence[Mapping[str, Any]]:
        """The tools of an environment as chat templates take them: `{"type": "function", "function":
        {"name", "description", "parameters"}}`; none for one that converses freely."""
        ...

    def name_for(self, columns: Mapping[str, Any]) -> str:
        """The environment that a line of the dataset uses: its column `environment`, or the only one."""
        ...

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ValueError when a `reset` needs a column that a dataset with `columns` does not have."""
        ...

    def print_to(self, path: Path) -> None:
        """Appends what environments print to this file, each line preceded by `environment`."""
        ...

    def begin(
        self,
        key: str,
        name: str,
        columns: Mapping[str, Any],
        seed: int,
        finish: Callable[[Reply | Lost], None],
    ) -> None:
        """Makes an instance, seeds it and resets it with the columns of the line."""
        ...

    def respond(self, key: str, messages: Sequence[Message], finish: Callable[[Reply | Lost], None]) -> None:
        """Answers a turn of the policy, the last of `messages` (all since the prompt's first, `content` the
        text as the policy wrote it, special tokens included)."""
        ...

    def end(self, key: str, messages: Sequence[Message], finish: Callable[[Ending | Lost], None]) -> None:
        """Asks for the environment's own reward and gives the instance up."""
        ...

    def drop(self, key: str) -> None:
        """Gives an instance up without asking anything; also one that is unknown or lost."""
        ...

    def close(self) -> None:
        """Ends all processes."""
        ...
