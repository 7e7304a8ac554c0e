"""`RewardSpec`, the settings of a reward function; finds and imports the function, reads its signature.

    def reward(prompts, completions, **columns) -> list[float | dict[str, float] | None]

This is the signature of TRL: a function written for it works unchanged. It is called by keyword. Each
argument is a list with one entry for each completion: `prompts` and `completions` (text, or lists of messages
for chat prompts), `completion_ids`, and the columns of the dataset. Single objects are `trainer_state` and,
for logging, the functions `log_extra(column, values)` and `log_metric(name, value)`. A function gets the
arguments that it declares, or all of them when it takes `**kwargs`. It may be any callable (`signature.py`),
also an `async` one. It may also be a class, of which each worker makes one object with `params` and calls it
like a function; or the `compute_score` of verl (`verl.py`).

A call has one sample unless `batch` asks for more, so that a deadline, an exception or a crash concerns one
sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

from rlhf.plugins import load_object
from rlhf.rewards.signature import (
    ALWAYS_GIVEN,
    Signature,
    called_by,
    did_you_mean,
    parameters_of,
    signature_of,
)
from rlhf.rewards.verl import VerlReward, verl_kind

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
    "goal": "rlhf.rewards.judges.goals:GoalReward",
}
NEEDS = {"math_match": ("math_verify", "rewards"), "gym": ("reasoning_gym", "gym")}
"""Package that a built-in needs, and the extra that installs it. A worker imports it before it says that it
is ready, so that the seconds which this takes do not count against the deadline of its first sample."""


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """The settings of one reward function, an entry of `reward.functions`.

    Example: `RewardSpec("my_rewards.py:brevity", weight=0.1, params={"limit": 50})`.
    """

    # what messages call the function, what it scores, and what it gives
    kind: ClassVar[str] = "reward function"
    scored: ClassVar[str] = "sample"
    score: ClassVar[str] = "reward"
    none_given: ClassVar[str] = "no function applies to them"

    path: str
    """The function: `package.module:function`, `path/file.py:function`, the name of a built-in
    (docs/rewards.md), or a name that an installed package offers in the entry-point group `rlhf.rewards`."""
    weight: float = 1.0
    """Factor of the function's score in the sum that is the reward."""
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of every call of the function; for a class, of its constructor."""
    name: str | None = None
    """Name of the objective, which metrics and other settings use; not given: the name of the function."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """For a function that returns dicts: weights of single objectives, by their keys; all others have
    `weight`."""
    timeout: float = 10.0
    """Seconds that a sample may take; a sample that takes longer gets no reward. A call of several samples
    has so many for each of them."""
    workers: int | None = None
    """Worker processes of the function on each rank; not given: the number of cores for the rank, but at most
    8, and 1 for a class."""
    batch: int | Literal["group", "step"] = 1
    """Samples in one call: a number, or `group` (all completions of a prompt), or `step` (all samples that
    are scored at once). Larger for a function that is faster on many, `group` or `step` for one that
    compares."""
    concurrency: int = 16
    """For an async function: most calls that a worker runs at the same time."""
    cache: int = 0
    """Number of samples whose scores are remembered, so that the same sample is not scored again; 0: none.
    Only for a function that always gives the same sample the same score."""
    memory_gib: float = 4.0
    """Most memory of a worker and the processes that it starts, in GiB; a worker beyond it is killed."""
    processes: int = 128
    """Most processes of a worker, itself and those that it starts; a worker beyond it is killed."""
    gpu: bool = False
    """Whether the workers may use the GPUs of the run."""
    variables: Sequence[str] = ()
    """Names of environment variables that the function needs, such as keys of services. It gets those that
    every program needs (`PATH`, `HOME`, ...), that of `params.key_variable`, and these, no others."""
    pickled: bytes | None = field(default=None, repr=False)
    """The function itself, as `dill` writes it, where it was given from Python and `path` only says where it
    was; no setting."""

    @property
    def called(self) -> str:
        """What messages call it before it has a name: what it is, and where."""
        return f"{self.kind} {self.path}"

    def load(self) -> Reward:
        """What a worker calls; raises as `load_reward` does."""
        return load_reward(self)


@runtime_checkable
class NeedsColumns(Protocol):
    """An object that needs columns which its signature leaves optional: others of its class do without."""

    @property
    def required_columns(self) -> tuple[str, ...]: ...


@runtime_checkable
class GivesSteps(Protocol):
    """An object that gives rewards to single steps, if this is True; that others do needs not be said."""

    @property
    def gives_steps(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function that is imported, with its signature; call it with the arguments of a batch."""

    function: Callable[..., Any]
    params: Mapping[str, Any]
    """Keyword arguments that every call gets in addition."""
    signature: Signature

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """The function's return value, which is a coroutine if it is async. It gets the arguments it
        accepts."""
        accepts = self.signature.accepts
        wanted = {k: v for k, v in arguments.items() if accepts is None or k in accepts}
        return self.function(**{**wanted, **self.params})


def load_reward(spec: RewardSpec) -> Reward:
    """Imports the function that a spec names, reads its signature, and makes the object if it is a class.

    Raises ValueError when there is no such function (the nearest name is suggested), it cannot be called, or
    it does not take one of `params`. An exception of the imported module or of the class is passed on.
    """
    found = find(spec, BUILT_IN)
    if not callable(found):
        raise ValueError(f"{spec.path} must be a function or a class, got {found!r:.80}")
    params = dict(spec.params)
    is_class = inspect.isclass(found)
    if is_class:
        parameters_of(spec.called, found, params)
        found, params = found(**params), {}
        if not callable(found):
            raise ValueError(
                f"{spec.path} is a class without __call__, so its objects cannot be called to score"
            )
    called = called_by(found)
    named, takes_any = parameters_of(spec.called, called, params)
    if kind := verl_kind(named):
        verl = VerlReward(found, named, params, kind)
        compares = "it takes solution_strs" if kind == "batch" else ""
        signature = Signature(
            verl.accepts, verl.requires, is_async=False, is_class=is_class, compares=compares
        )
        return Reward(verl, {}, signature)
    signature = signature_of(named, takes_any, called, params, is_class=is_class)
    needing: object = found
    if isinstance(needing, NeedsColumns):
        columns = ((name,) for name in needing.required_columns)
        signature = replace(signature, requires=(*signature.requires, *columns))
    if isinstance(needing, GivesSteps):
        signature = replace(signature, gives_steps=needing.gives_steps)
    return Reward(found, params, signature)


def find(spec: RewardSpec, built_in: Mapping[str, str]) -> Any:
    """The object that `spec.path` names: in a file or package, among those built in, or offered by a package.

    Raises ValueError when there is none, or `params` has an argument that the trainer gives.
    """
    for key in spec.params:
        if key in ALWAYS_GIVEN:
            raise ValueError(f"{spec.called}: {key!r} is given by the trainer, not by params")
    if spec.pickled is not None:
        import dill  # pyright: ignore[reportMissingTypeStubs]

        return cast(Any, dill).loads(spec.pickled)
    return load_object(spec.path) if ":" in spec.path else _find_by_name(spec.path, built_in, spec)


def _find_by_name(name: str, built_in: Mapping[str, str], spec: RewardSpec) -> Any:
    if name.endswith(".py"):
        what = spec.kind.removesuffix(" function")
        raise ValueError(f"a {what} is the file {name}: name a function in it too, as {name}:my_{what}")
    if name in built_in:
        if name in NEEDS:
            _import_package(name, *NEEDS[name])
        return load_object(built_in[name])
    # imported here, because it takes as long to import as everything else in a worker
    from importlib.metadata import entry_points

    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = sorted({*built_in, *offered})
        raise ValueError(
            f"no installed package offers a {spec.kind} {name!r}{did_you_mean(name, known)}; "
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


def name_apart(names: Sequence[str]) -> list[str]:
    """Unique names of objectives: of a name that comes again, the second is `match_2`, the third
    `match_3`."""
    apart: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in apart:
            number += 1
            unique = f"{name}_{number}"
        apart.append(unique)
    return apart
