"""A temperature for each prompt of `awr`: how far the weights of its completions may differ from equal ones.

Our adaptation of FamO2O (arXiv:2310.17966), which picks for every state how far the policy improves on the
data. Differences: 1. what is picked is the temperature of a whole prompt; 2. the policy is not conditioned on
it, there is no family of policies, the temperature only sets the weights that the policy learns with; 3. the
temperature is not picked by the highest Q, for which a Q would be needed, but is the optimum of

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
"""Bound of a prompt's factor, 1 / RANGE to RANGE. The prompt's temperature is the algorithm's times its
factor."""


@dataclass(frozen=True, slots=True)
class PromptTemperature:
    """How the temperature of a prompt is chosen: by the factor that minimises `dual`."""

    divergence: float
    """Largest KL(w || equal weights), in nats; with n completions a KL is at most log n."""
    exponents: Callable[[AdvantageInputs], Tensor]
    """A / temperature of each sequence, `[S]`; the factor of its prompt divides it."""

    def __post_init__(self) -> None:
        if self.divergence <= 0:
            raise ValueError(
                f"divergence must be above 0 nats, or null for one temperature for all, got {self.divergence}"
            )

    def dual(
        self, factor: Float[Tensor, " P"], exponents: Float[Tensor, "P G"], there: Bool[Tensor, "P G"]
    ) -> Float[Tensor, " P"]:
        """The dual of each prompt, `[P]`: to be minimised in `factor`, in which it is convex. `there` is
        False where a group has fewer than G completions."""
        scaled = exponents.masked_fill(~there, 0.0) / factor[:, None]
        scaled = scaled.masked_fill(~there, -float("inf"))
        return factor * (self.divergence + scaled.logsumexp(1) - there.sum(1).log())


def factor_of(share: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """The output of a head, 0 to 1 -> a factor of 1 / RANGE to RANGE, on a logarithmic scale."""
    return RANGE ** (2 * share - 1)
