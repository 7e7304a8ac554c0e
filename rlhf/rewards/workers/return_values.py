"""Checks what a reward function returned and turns it into scores by objective, or a WrongReturn."""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, SupportsFloat, cast, runtime_checkable

Scores = dict[str, float]
"""Value of each objective; empty: the function does not apply to the sample."""


LARGEST = 3.4e38
"""About the largest float32: advantages are float32, so a larger number would be infinite."""


class WrongReturn(TypeError):
    """A reward function returned something that is not a reward. The function is at fault, not the sample."""


@runtime_checkable
class _Array(Protocol):
    def tolist(self) -> Any: ...


def read_values(returned: object, count: int, what: str = "values, one a completion") -> list[Any]:
    """The `count` values in a returned list, tuple or array. Raises WrongReturn, which calls them `what`, for
    anything else.
    """
    if isinstance(returned, _Array):
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        raise WrongReturn(
            f"must return a list of {count} {what}, got {type(returned).__name__} {returned!r:.80}"
        )
    values = cast(Sequence[Any], returned)
    if len(values) != count:
        raise WrongReturn(f"must return {count} {what}, got {len(values)}")
    return list(values)


def read_scores(value: object, name: str) -> Scores:
    """The objectives in one returned value; a plain number is the objective `name`. Raises WrongReturn."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {name: _number(value)}
    objectives = cast(Mapping[object, object], value)
    if not all(isinstance(key, str) for key in objectives):
        raise WrongReturn(f"must name objectives by text, got {value!r:.80}")
    return {str(key): _number(part) for key, part in objectives.items() if part is not None}


def is_finite(scores: Scores) -> bool:
    """Whether all values are finite numbers in float32."""
    # the comparison is false for NaN too
    return all(abs(number) <= LARGEST for number in scores.values())


def run_now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, for a function that returns one without being declared async."""
    # imported only when needed: it takes half of the time in which a worker starts
    import asyncio

    return asyncio.run(coroutine)


def _number(value: object) -> float:
    # NumPy numbers, tensors of one element, Decimal and Fraction are accepted like float; text is not
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
