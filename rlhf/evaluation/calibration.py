"""How well predicted probabilities and scores agree with what came (calibration of reward models)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bin:
    """The predictions of one range: how many, what they say in the mean, and what came."""

    count: int
    predicted: float
    observed: float


def pair_calibration(margins: Float[Tensor, " P"], bins: int = 10) -> list[Bin]:
    """Confidence sigmoid(|chosen - rejected|), 0.5 .. 1, against the share of pairs in which it was right.

    A tie is right by half. Ranges without a pair are left out.
    """
    confidence = margins.double().abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    return _binned(confidence, right, ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1), bins)


def rating_calibration(
    scores: Float[Tensor, " S"], ratings: Float[Tensor, " S"], bins: int = 10
) -> list[Bin]:
    """Scores in ranges with equally many of them, against the mean rating there; the unrated left out."""
    known = ~ratings.isnan()
    scores, ratings = scores[known].double(), ratings[known].double()
    rank = scores.argsort(stable=True).argsort(stable=True)
    return _binned(scores, ratings, rank * bins // max(1, len(scores)), bins)


def calibration_error(bins: list[Bin]) -> float:
    """Mean of |predicted - observed| over everything that was predicted."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / total if total else float("nan")


def _binned(predicted: Tensor, observed: Tensor, index: Tensor, bins: int) -> list[Bin]:
    found: list[Bin] = []
    for number in range(bins):
        here = index == number
        if count := int(here.sum()):
            found.append(Bin(count, predicted[here].mean().item(), observed[here].mean().item()))
    return found
