"""A reward function by name, and what its signature asks for.

    def reward(prompts, completions, **columns) -> list[float | dict[str, float] | None]

This is the signature of TRL: a function written for it works unchanged. It is called by keyword, once for a
whole batch, each argument a list with one entry a completion: `prompts` and `completions` (text, or lists of
messages for chat prompts), `completion_ids`, and the columns of the dataset; `trainer_state` alone is one
object. A function gets what it declares, and everything when it takes `**kwargs`. It may be `async`.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, cast

from rlhf.plugins import load_object

ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")
ENTRY_POINTS = "rlhf.rewards"


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """How a config names a reward function.

    Example: `RewardSpec("my_rewards.py:brevity", weight=0.1, params={"limit": 50})`.
    """

    path: str
    """`package.module:function`, `path/file.py:function`, or a name of the entry-point group."""
    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of every call."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function, found and understood; call it with a batch's arguments."""

    name: str
    weight: float
    function: Callable[..., Any]
    params: Mapping[str, Any]
    accepts: frozenset[str] | None
    """None: any keyword."""
    requires: frozenset[str]
    """What must come from the batch: keywords without default that `params` does not set."""

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        wanted = {k: v for k, v in arguments.items() if self.accepts is None or k in self.accepts}
        result = self.function(**{**wanted, **self.params})
        if inspect.iscoroutine(result):
            return asyncio.run(cast(Coroutine[Any, Any, Any], result))
        return result

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ValueError when the function needs a column that a dataset with `columns` does not have."""
        columns = tuple(columns)
        missing = sorted(self.requires.difference(ALWAYS_GIVEN, columns))
        if missing:
            needs = ", ".join(f"{name!r}{_did_you_mean(name, columns)}" for name in missing)
            has = ", ".join(repr(name) for name in columns) or "none beside the prompt"
            raise ValueError(
                f"reward function {self.name} needs what the dataset does not have: {needs}. "
                f"Its columns: {has}. Add the column, or set the argument in params"
            )


def load_reward(spec: RewardSpec) -> Reward:
    """Imports the function behind a spec and reads its signature.

    Raises ValueError when there is no such function (its nearest neighbour is named), it cannot be called, or
    it does not take one of `params`. An exception of the imported module itself is passed on.
    """
    function = load_object(spec.path) if ":" in spec.path else _load_entry_point(spec.path)
    name = spec.path.rpartition(":")[2]
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"{spec.path} must be a function, got {function!r:.80}")
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise ValueError(
            f"reward function {spec.path} is called by keyword, but has positional-only parameters"
        )
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in spec.params:
        if key in ALWAYS_GIVEN:
            raise ValueError(f"reward function {spec.path}: {key!r} is given by the trainer, not by params")
        if key not in named and not takes_any:
            raise ValueError(f"reward function {spec.path} does not take {key!r}{_did_you_mean(key, named)}")
    required = {key for key, p in named.items() if p.default is p.empty and key not in spec.params}
    return Reward(
        name=name,
        weight=spec.weight,
        function=function,
        params=dict(spec.params),
        accepts=None if takes_any else frozenset(named),
        requires=frozenset(required),
    )


def _load_entry_point(name: str) -> Any:
    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        raise ValueError(
            f"no installed package offers a reward function {name!r}{_did_you_mean(name, offered)}; "
            "expected package.module:function, path/file.py:function or one of: "
            f"{', '.join(sorted(offered)) or 'none'}"
        )
    return offered[name].load()


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
