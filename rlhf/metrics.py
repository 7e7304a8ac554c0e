"""Partial aggregates of metrics (`Mean`, `Sum`, `Max`, `ExpMean`), merged over microbatches and ranks.

A mean travels as a sum and a count and is divided once, when it is written, so that no mean of means is ever
taken. docs/metrics.md has the name, unit and healthy range of every metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, kept as the sum and the count of its items. `(Mean(1.0, 1) + Mean(0.0, 3)).value == 0.25`."""

    total: float
    count: float = 1.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class Sum:
    """A quantity that adds up over microbatches and ranks."""

    total: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True, slots=True)
class ExpMean:
    """The exponential of a mean, taken after everything is summed; a perplexity is one."""

    total: float
    count: float = 1.0

    def __add__(self, other: ExpMean) -> ExpMean:
        return ExpMean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return math.exp(min(self.total / self.count, 700.0)) if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value seen."""

    largest: float

    def __add__(self, other: Max) -> Max:
        return Max(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        return self.largest


Partial = Mean | ExpMean | Sum | Max
Metrics = dict[str, Partial]


def merge(parts: Iterable[Mapping[str, Partial]]) -> Metrics:
    """Adds up partials of the same name. Raises AssertionError when one name has partials of two types."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = _add(name, merged[name], value) if name in merged else value
    return merged


def _add(name: str, a: Partial, b: Partial) -> Partial:
    match a, b:
        case Mean(), Mean():
            return a + b
        case ExpMean(), ExpMean():
            return a + b
        case Sum(), Sum():
            return a + b
        case Max(), Max():
            return a + b
        case _:
            raise AssertionError(f"{name}: {a} and {b}")
