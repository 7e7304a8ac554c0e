"""A reward function by name, and what its signature asks for.

    def reward(prompts, completions, **columns) -> list[float | dict[str, float] | None]

This is the signature of TRL: a function written for it works unchanged. It is called by keyword, each
argument a list with one entry a completion: `prompts` and `completions` (text, or lists of messages for chat
prompts), `completion_ids`, and the columns of the dataset; `trainer_state` alone is one object. A function
gets what it declares, and everything when it takes `**kwargs`. It may be `async`. It may be a class, made
once with `params` in each worker, whose objects are called like this. And it may be the `compute_score` of
verl (`verl.py`).

A call has one sample, unless `batch` asks for more: a deadline, an exception and a crash belong to a sample.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, cast

from rlhf.plugins import load_object
from rlhf.rewards.verl import VerlReward, is_compute_score

ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")
ENTRY_POINTS = "rlhf.rewards"
BUILT_IN = {
    "numeric_match": "rlhf.rewards.builtin:numeric_match",
    "exact_match": "rlhf.rewards.builtin:exact_match",
    "format_match": "rlhf.rewards.builtin:format_match",
    "json_match": "rlhf.rewards.builtin:json_match",
    "length": "rlhf.rewards.builtin:length",
    "overlong": "rlhf.rewards.builtin:overlong",
    "math_match": "rlhf.rewards.mathematics:math_match",
    "gym": "rlhf.rewards.gym:score",
    "code": "rlhf.rewards.code:CodeReward",
    "reward_model": "rlhf.rewards.model:RewardModel",
    "remote": "rlhf.rewards.remote:RemoteReward",
    "judge": "rlhf.rewards.remote:LLMJudge",
}
NEEDS = {"math_match": ("math_verify", "rewards"), "gym": ("reasoning_gym", "gym")}
"""Package that a built-in works with, and the extra it comes with. Imported before a worker says that it is
ready: that takes seconds, which are not those of its first sample."""


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """How a config names a reward function.

    Example: `RewardSpec("my_rewards.py:brevity", weight=0.1, params={"limit": 50})`.
    """

    path: str
    """`package.module:function`, `path/file.py:function`, a built-in's name, or one of the entry points."""
    weight: float = 1.0
    """Of its number in the sum."""
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of every call; of a class, of its construction."""
    name: str | None = None
    """Of the objective, instead of the function's own."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of single objectives of a function that returns dicts, instead of `weight`."""
    timeout: float = 10.0
    """Seconds a sample may take."""
    workers: int | None = None
    """Processes; not given: as many as there are cores for this rank, at most 8, and one of a class."""
    batch: int | Literal["group", "step"] = 1
    """Samples of one call: a number, whole groups, or all that are scored at once."""
    concurrency: int = 16
    """Calls of an async function that a worker has under way at once."""
    cache: int = 0
    """Samples whose scores are remembered, of a function that always says the same of the same sample."""
    memory_gib: float = 4.0
    """Of a worker with all it starts."""
    processes: int = 128
    """Of a worker with all it starts."""
    gpu: bool = False
    """Whether it may see the GPUs."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What the trainer has to know of a reward function that it does not import itself.

    Example: `Signature(("completions", "answer"), (("answer",),), is_async=False, is_class=False)`.
    """

    accepts: tuple[str, ...] | None
    """None: any keyword."""
    requires: tuple[tuple[str, ...], ...]
    """What must come from the batch, each with what may stand for it."""
    is_async: bool
    is_class: bool

    def check_columns(self, name: str, columns: Iterable[str]) -> None:
        """Raises ValueError when reward `name` needs a column that a dataset with `columns` does not have."""
        columns = tuple(columns)
        missing = [any_of for any_of in self.requires if not {*ALWAYS_GIVEN, *columns}.intersection(any_of)]
        if missing:
            needs = ", ".join(
                f"{' or '.join(map(repr, any_of))}{_did_you_mean(any_of[0], (*ALWAYS_GIVEN, *columns))}"
                for any_of in missing
            )
            has = ", ".join(repr(column) for column in columns) or "none beside the prompt"
            raise ValueError(
                f"reward function {name} needs what the dataset does not have: {needs}. "
                f"Its columns: {has}. Add the column, or set the argument in params"
            )


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function, found and understood; call it with a batch's arguments."""

    function: Callable[..., Any]
    params: Mapping[str, Any]
    """Of each call."""
    signature: Signature

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """What the function returns: a coroutine if it is async."""
        accepts = self.signature.accepts
        wanted = {k: v for k, v in arguments.items() if accepts is None or k in accepts}
        return self.function(**{**wanted, **self.params})


def load_reward(spec: RewardSpec) -> Reward:
    """Imports the function behind a spec, reads its signature, and makes the object if it is a class.

    Raises ValueError when there is no such function (its nearest neighbour is named), it cannot be called, or
    it does not take one of `params`. An exception of the imported module or of the class is passed on.
    """
    found = load_object(spec.path) if ":" in spec.path else _load_by_name(spec.path)
    if not callable(found):
        raise ValueError(f"{spec.path} must be a function or a class, got {found!r:.80}")
    params = dict(spec.params)
    for key in params:
        if key in ALWAYS_GIVEN:
            raise ValueError(f"reward function {spec.path}: {key!r} is given by the trainer, not by params")
    is_class = inspect.isclass(found)
    if is_class:
        _check_params(spec.path, found, params)
        found, params = found(**params), {}
        if not callable(found):
            raise ValueError(f"{spec.path} is a class without __call__: its objects score nothing")
    called = found if inspect.isroutine(found) else cast(Any, found).__call__
    named, takes_any = _check_params(spec.path, called, params)
    if is_compute_score(named):
        verl = VerlReward(found, named)
        requires = tuple(any_of for any_of in verl.requires if not params.keys() & set(any_of))
        return Reward(verl, params, Signature(verl.accepts, requires, is_async=False, is_class=is_class))
    accepts = None if takes_any else tuple(named)
    requires = tuple((key,) for key, p in named.items() if p.default is p.empty and key not in params)
    is_async = inspect.iscoroutinefunction(called)
    return Reward(found, params, Signature(accepts, requires, is_async=is_async, is_class=is_class))


def _check_params(
    path: str, called: Callable[..., Any], params: Mapping[str, Any]
) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters by name, and whether any other keyword is taken too."""
    parameters = inspect.signature(called).parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise ValueError(f"reward function {path} is called by keyword, but has positional-only parameters")
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in params:
        if key not in named and not takes_any:
            raise ValueError(f"reward function {path} does not take {key!r}{_did_you_mean(key, named)}")
    return named, takes_any


def _load_by_name(name: str) -> Any:
    if name.endswith(".py"):
        raise ValueError(f"a reward is the file {name}: name a function in it too, as {name}:my_reward")
    if name in BUILT_IN:
        if name in NEEDS:
            _import_package(name, *NEEDS[name])
        return load_object(BUILT_IN[name])
    # as slow to import as all the rest of a worker
    from importlib.metadata import entry_points

    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = sorted({*BUILT_IN, *offered})
        raise ValueError(
            f"no installed package offers a reward function {name!r}{_did_you_mean(name, known)}; "
            f"expected package.module:function, path/file.py:function or one of: {', '.join(known)}"
        )
    return offered[name].load()


def _import_package(name: str, package: str, extra: str) -> None:
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(
            f"reward function {name} needs the package {package}: pip install 'tandem-rl[{extra}]'"
        ) from None


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def name_apart(names: Sequence[str]) -> list[str]:
    """The same function twice, with other parameters, is two objectives: `match` and `match_2`."""
    apart: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in apart:
            number += 1
            unique = f"{name}_{number}"
        apart.append(unique)
    return apart
