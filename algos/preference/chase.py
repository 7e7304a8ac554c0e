"""Chase: a fast and a slow copy of the policy learn the same pairs and spur each other on (OFS-DPO).

    loss of the fast copy = l(z_fast) + alpha l(z_fast - z_slow)
    loss of the slow copy = l(z_slow) - alpha l(z_fast - z_slow)

(arXiv:2406.05534 equations 3 to 6.) z is the margin of a copy and l the loss of a margin, those of `dpo`. In
each loss the other copy's margin is a constant. z_fast - z_slow is the margin that `dpo` would have with the
slow copy as the reference. Both terms with alpha make their own copy's margin grow, with the slope
alpha sigmoid(z_slow - z_fast), which stays near alpha / 2 while the copies are close: the gradient does not
vanish as the one of l(z) does when all pairs are learned. Margins therefore never stop growing.

The paper's full text and code were not to be found: this follows its abstract and another implementation that
cites it. Differences: 1. alpha, the ratio of the learning rates and the interval have no known values; 2. the
difference of margins counts as at most 10 on either side, as in that implementation, because the loss of the
slow copy has no lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.algos.preference.checks import check_above_zero
from rlhf.algos.preference.compares import clipped_logistic
from rlhf.tensors.contrasts import Rival

BOUND = 10.0


@dataclass(frozen=True, slots=True)
class Chase:
    """How the two copies learn."""

    alpha: float
    """Weight of the chase."""
    lr_ratio: float
    """Learning rate of the second copy, as a share of that of the first."""
    interval: int
    """Steps after which the copy with the lower mean loss becomes the fast one."""

    def __post_init__(self) -> None:
        check_above_zero(lr_ratio=self.lr_ratio, interval=self.interval)
        if self.alpha < 0:
            raise ValueError(f"alpha must be 0 or more, got {self.alpha}")
        if self.lr_ratio > 1:
            raise ValueError(f"lr_ratio must be at most 1 for the slow copy, got {self.lr_ratio}")


def lead(margin: Tensor, rival: Rival) -> Tensor:
    """z_fast - z_slow `[M]`, with gradient into the own copy's margin alone."""
    return margin - rival.margin if rival.is_slow else rival.margin - margin


def chase_loss(margin: Tensor, rival: Rival, target: Tensor) -> Tensor:
    """l(z_fast - z_slow) `[M]`, plus for the fast copy and minus for the slow one."""
    loss = clipped_logistic(BOUND)(lead(margin, rival), target)
    return loss if rival.is_slow else -loss
