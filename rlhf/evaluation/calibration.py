"""Calibration of reward models: how well confidences and scores agree with the observed outcomes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bin:
    """The predictions in one bin: their number, their mean, and the mean of the observed outcomes."""

    count: int
    predicted: float
    observed: float


def pair_calibration(margins: Float[Tensor, " P"], bins: int = 10) -> list[Bin]:
    """Confidence sigmoid(|margin|), 0.5 .. 1, against the share of correctly ranked pairs.

    `margins`: score of the chosen minus score of the rejected completion `[P]`. A tie counts as half correct.
    Bins have equal width; bins without a pair are left out.
    """
    confidence = margins.double().abs().sigmoid()
    correct = (margins > 0).double() + 0.5 * (margins == 0).double()
    return _binned(confidence, correct, ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1), bins)


def rating_calibration(
    scores: Float[Tensor, " S"], ratings: Float[Tensor, " S"], bins: int = 10
) -> list[Bin]:
    """Scores against mean ratings, in bins of equally many scores; unrated completions are left out."""
    known = ~ratings.isnan()
    scores, ratings = scores[known].double(), ratings[known].double()
    rank = scores.argsort(stable=True).argsort(stable=True)
    return _binned(scores, ratings, rank * bins // max(1, len(scores)), bins)


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: mean of |predicted - observed| over all predictions; NaN without any."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / total if total else float("nan")


def _binned(predicted: Tensor, observed: Tensor, index: Tensor, bins: int) -> list[Bin]:
    """The non-empty bins; `index` `[N]` says in which bin each prediction is."""
    filled: list[Bin] = []
    for number in range(bins):
        inside = index == number
        if count := int(inside.sum()):
            filled.append(Bin(count, predicted[inside].mean().item(), observed[inside].mean().item()))
    return filled
