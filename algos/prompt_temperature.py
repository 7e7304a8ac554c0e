"""A temperature for each prompt: how far the weights of its completions may move from equal ones.

Our adaptation of FamO2O (arXiv:2310.17966), which has a balance between improvement and the data for every
state. Differences: 1. the balance is picked for a whole prompt; 2. the policy is not conditioned on it, there
is no family of policies, the balance only sets the weights it learns by; 3. the one that is picked is not
that of the highest Q, for which a Q would be needed, but the optimum of

    maximise  sum_i w_i A_i    subject to  KL(w || equal weights) <= divergence

over weights w of a prompt's completions. Its solution is w_i ~ exp(A_i / eta), and eta minimises the dual
(MPO, arXiv:1806.06920 eq. 9)

    eta * divergence + eta * log mean_i exp(A_i / eta)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.types import AdvantageInputs

RANGE = 10.0
"""A prompt's temperature is between a tenth of the algorithm's and ten times it."""


@dataclass(frozen=True, slots=True)
class PromptTemperature:
    """What the temperature of a prompt is chosen by."""

    divergence: float
    """KL(w || equal weights) in nats; with n completions log n is the largest there is."""
    exponents: Callable[[AdvantageInputs], Tensor]
    """A / temperature of each sequence, `[S]`, which a prompt's factor divides."""

    def __post_init__(self) -> None:
        if self.divergence <= 0:
            raise ValueError(f"divergence must be above 0 nats, or none at all, got {self.divergence}")

    def dual(
        self, factor: Float[Tensor, " P"], exponents: Float[Tensor, "P G"], there: Bool[Tensor, "P G"]
    ) -> Float[Tensor, " P"]:
        """To be minimised in `factor`, in which it is convex; `there` is False where a group is smaller."""
        scaled = exponents.masked_fill(~there, 0.0) / factor[:, None]
        scaled = scaled.masked_fill(~there, -float("inf"))
        return factor * (self.divergence + scaled.logsumexp(1) - there.sum(1).log())


def factor_of(share: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """A share of 0 to 1 -> a factor of 1 / RANGE to RANGE, on a logarithmic scale."""
    return RANGE ** (2 * share - 1)
