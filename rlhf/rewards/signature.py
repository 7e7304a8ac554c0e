"""`Signature`: what a reward function takes, as the function says, and whether a dataset has it.

A function may be any callable: a function, a lambda, a `functools.partial`, an object with `__call__` (of a
dataclass, say) or a torch module, whose `forward` is read.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rlhf.rewards.source import Reading, read_source

FROM_WORKER = ("log_extra", "log_metric")
"""Arguments that the worker adds: functions that log what they are given, as in TRL."""
ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", *FROM_WORKER)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a worker tells the trainer about its reward function, which the trainer does not import itself.

    Example: `Signature(("completions", "answer"), (("answer",),), is_async=False, is_class=False)`.
    """

    accepts: tuple[str, ...] | None
    """Names of the arguments that it takes; None: any keyword."""
    requires: tuple[tuple[str, ...], ...]
    """Arguments that it needs, each with the names (one is enough) under which the trainer may have it."""
    is_async: bool
    is_class: bool
    may_read: tuple[str, ...] = ()
    """Entries of its `**kwargs` that some calls read, by its source."""
    compares: str = ""
    """The first expression in its source that compares samples; empty: none was found."""
    gives_steps: bool = False
    """Whether it says that it gives rewards to single steps."""

    def check_columns(self, who: str, columns: Iterable[str]) -> None:
        """Raises ValueError when `who` needs a column that a dataset with `columns` does not have."""
        columns = tuple(columns)
        missing = [any_of for any_of in self.requires if not {*ALWAYS_GIVEN, *columns}.intersection(any_of)]
        if missing:
            needs = ", ".join(
                f"{' or '.join(map(repr, any_of))}{did_you_mean(any_of[0], (*ALWAYS_GIVEN, *columns))}"
                for any_of in missing
            )
            has = ", ".join(repr(column) for column in columns) or "none beside the prompt"
            raise ValueError(
                f"{who} needs columns that the dataset does not have: {needs}. "
                f"Its columns: {has}. Add the column, or set the argument in params"
            )

    def cautions(self, who: str, columns: Iterable[str], batch: int | str) -> Iterator[str]:
        """What may be wrong with `who` on a dataset with `columns`, with `batch` samples a call."""
        lacking = [key for key in self.may_read if key not in {*ALWAYS_GIVEN, *columns}]
        if lacking:
            yield (
                f"{who} reads {', '.join(map(repr, lacking))} from its keyword arguments in "
                "some calls, but the dataset has no such column: these calls would fail"
            )
        if self.compares and batch == 1:
            yield (
                f"{who} seems to compare samples ({self.compares}), but each call has "
                "one: set its batch to group (the completions of a prompt) or step (all of a step)"
            )


def called_by(found: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs when `found` is called: it has the signature and the source that count."""
    if isinstance(found, partial):
        inner = cast("partial[Any]", found)
        return partial(called_by(inner.func), *inner.args, **inner.keywords)
    if inspect.isroutine(found):
        return found
    # a module of torch is called through a function that takes anything
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(found, torch.nn.Module):
        return cast(Any, found).forward
    return cast(Any, found).__call__


def parameters_of(
    who: str, called: Callable[..., Any], params: Mapping[str, Any]
) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters by name, and whether any other keyword is taken too.

    What a `partial` has fixed is not a parameter, unless it is in `params`. Raises ValueError when there are
    positional-only parameters, or when one of `params` is not taken.
    """
    try:
        parameters = inspect.signature(called).parameters.values()
    except ValueError:
        raise ValueError(f"{who} does not say what it takes: wrap it in a function") from None
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise ValueError(f"{who} is called by keyword, but has positional-only parameters")
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in params:
        if key not in named and not takes_any:
            raise ValueError(f"{who} does not take {key!r}{did_you_mean(key, named)}")
    fixed = set(called.keywords) if isinstance(called, partial) else set[str]()
    return {key: p for key, p in named.items() if key not in fixed or key in params}, takes_any


def signature_of(
    named: Mapping[str, inspect.Parameter],
    takes_any: bool,
    called: Callable[..., Any],
    params: Mapping[str, Any],
    *,
    is_class: bool,
) -> Signature:
    """The signature of a function with the parameters that `parameters_of` gave."""
    needed = [key for key, p in named.items() if p.default is p.empty and key not in params]
    function, is_async, fixed = called, inspect.iscoroutinefunction(called), set(params)
    while isinstance(function, partial):
        fixed |= set(function.keywords)
        function = function.func
    samples = {*ALWAYS_GIVEN[:3], *needed} - {"trainer_state", *FROM_WORKER}
    reading = read_source(function, samples) if named or takes_any else Reading()
    needed += [key for key in reading.always if key not in fixed and key not in needed]
    return Signature(
        accepts=None if takes_any else tuple(named),
        requires=tuple((key,) for key in needed),
        is_async=is_async,
        is_class=is_class,
        may_read=tuple(key for key in reading.perhaps if key not in fixed),
        compares=reading.compares,
    )


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
