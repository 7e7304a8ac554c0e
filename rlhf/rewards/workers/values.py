"""What a reward function returned, read in the worker: numbers, dicts of numbers, None, or a mistake."""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, SupportsFloat, cast, runtime_checkable

Scores = dict[str, float]
"""Objective to value; empty: the function does not apply."""


LARGEST = 3.4e38
"""Of float32, in which advantages are computed: beyond it a number is infinite."""


class WrongReturn(TypeError):
    """The function is wrong, not the sample: what it returns is no reward."""


@runtime_checkable
class _Array(Protocol):
    def tolist(self) -> Any: ...


def read_values(returned: object, count: int) -> list[Any]:
    """One value a completion, of a list, a tuple or an array. Raises WrongReturn."""
    if isinstance(returned, _Array):
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        raise WrongReturn(
            f"must return a list of {count} values, one a completion, "
            f"got {type(returned).__name__} {returned!r:.80}"
        )
    values = cast(Sequence[Any], returned)
    if len(values) != count:
        raise WrongReturn(f"must return {count} values, one a completion, got {len(values)}")
    return list(values)


def read_scores(value: object, name: str) -> Scores:
    """The objectives in one value; a plain number belongs to the objective `name`. Raises WrongReturn."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {name: _number(value)}
    objectives = cast(Mapping[object, object], value)
    if not all(isinstance(key, str) for key in objectives):
        raise WrongReturn(f"must name objectives by text, got {value!r:.80}")
    return {str(key): _number(part) for key, part in objectives.items() if part is not None}


def is_finite(scores: Scores) -> bool:
    # false of NaN too
    return all(abs(number) <= LARGEST for number in scores.values())


def run_now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Of a function that is not declared async and returns a coroutine all the same."""
    # imported when needed: it is half of what a worker takes to start
    import asyncio

    return asyncio.run(coroutine)


def _number(value: object) -> float:
    # numbers of numpy, tensors of one element, Decimal and Fraction are as good as float; text is not
    if isinstance(value, SupportsFloat):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongReturn(f"must return numbers, got {value!r:.80}: {error}") from None
    raise WrongReturn(
        f"must return numbers, dicts of numbers or None, got {type(value).__name__} {value!r:.80}"
    )
