"""Checks what a reward function returned and turns it into scores by objective, or a WrongReturn."""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping, Sequence
from operator import index
from typing import Any, Protocol, SupportsFloat, SupportsIndex, cast, runtime_checkable

Steps = list[tuple[int, float]]
"""Of each step of a completion where it ends in the text, in characters, and its score."""
Scores = dict[str, float | Steps]
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
    """The objectives in one returned value: an objective is a number, or a list of `(end, score)`.

    A value that is no dict is the objective `name`. Raises WrongReturn.
    """
    return {key: _score(part) for key, part in _by_objective(value, name).items()}


def scores_of_json(read: Mapping[str, Any]) -> Scores:
    """What `read_scores` returned, after it was JSON, which has no tuples."""
    return {
        key: [(end, part) for end, part in cast(Steps, score)] if isinstance(score, list) else score
        for key, score in read.items()
    }


def read_numbers(value: object, name: str) -> dict[str, float]:
    """As `read_scores`, where only numbers will do."""
    return {key: _number(part) for key, part in _by_objective(value, name).items()}


def _by_objective(value: object, name: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {name: value}
    objectives = cast(Mapping[object, object], value)
    if not all(isinstance(key, str) for key in objectives):
        raise WrongReturn(f"must name objectives by text, got {value!r:.80}")
    return {str(key): part for key, part in objectives.items() if part is not None}


def summed(score: float | Steps) -> float:
    """The score of a whole completion: that of its steps together."""
    return sum(part for _, part in score) if isinstance(score, list) else score


def is_finite(scores: Mapping[str, float | Steps]) -> bool:
    """Whether all values, and all parts of them, are finite numbers in float32."""
    numbers = [summed(score) for score in scores.values()]
    numbers += [part for score in scores.values() if isinstance(score, list) for _, part in score]
    # the comparison is false for NaN too
    return all(abs(number) <= LARGEST for number in numbers)


def run_now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, for a function that returns one without being declared async."""
    # imported only when needed: it takes half of the time in which a worker starts
    import asyncio

    return asyncio.run(coroutine)


def _score(value: object) -> float | Steps:
    if not isinstance(value, list | tuple):
        return _number(value)
    steps: Steps = []
    for step in cast(Sequence[object], value):
        pair = list(cast(Sequence[object], step)) if isinstance(step, list | tuple) else []
        if len(pair) != 2 or not isinstance(pair[0], SupportsIndex) or isinstance(pair[0], bool):
            raise WrongReturn(
                "must return for each step where it ends in the text, as a number of characters, and its "
                f"score, [(12, 0.5), (40, -1.0)] for example, got {step!r:.80}"
            )
        steps.append((index(pair[0]), _number(pair[1])))
    return steps


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
