"""KL(policy || reference) from the sampled tokens alone; its settings, and the controller of its weight.

With d = logprobs - ref_logprobs on tokens sampled from the policy (Schulman,
http://joschu.net/blog/kl-approx.html):

    k1 = d                 no bias, both signs, noisy; expected gradient 0: for the reward, not the loss
    k2 = d^2 / 2           biased, but its gradient is that of KL(policy || reference)
    k3 = exp(-d) - 1 + d   no bias, never negative; its gradient is that of KL(reference || policy)
    k3_plus                the value of k3 with the gradient of k2

Guards, as in the published codes: -d is kept in [-20, 20] before the exponential and k3 in [0, 10]; beyond,
there is no gradient and, for k3, a bias (d below -2.6). The KL of the whole vocabulary ("exact"), in either
direction, is computed where the logits are, by `token_stats`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """d = log policy - log reference, in nats."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """d^2 / 2."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """exp(-d) - 1 + d; 0 only where d is 0."""
    minus_d = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    # expm1 keeps the digits that exp(x) - 1 loses where policy and reference nearly agree
    return (minus_d.expm1() - minus_d).clamp(max=10.0)


def k3_plus(logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Value of k3, gradient of k2."""
    smooth = k2(logprobs, ref_logprobs)
    return smooth + (k3(logprobs, ref_logprobs) - smooth).detach()


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A coefficient that keeps the KL near `target` (arXiv:1909.08593 section 2.2); without tensors.

    coef <- coef * (1 + clip(observed / target - 1, -0.2, 0.2) * samples / horizon)
    """

    coef: float
    target: float
    horizon: int

    def update(self, observed: float, samples: int) -> AdaptiveKL:
        """The controller after `samples` trajectories with a mean KL of `observed` nats a token."""
        error = min(max(observed / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * samples / self.horizon))


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}


@dataclass(frozen=True, slots=True)
class KL:
    """The KL from the reference model: its weight, its estimator and its place."""

    coef: float = 0.0
    """Weight of the KL; 0: no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3", "k3+", "exact"] = "k3"
    """`k1` to `k3+` estimate the KL from the sampled tokens; `exact` sums over the whole vocabulary."""
    forward: float = 0.0
    """For `exact`: share of the forward KL(reference || policy), from 0 to 1; the rest is the reverse
    KL(policy || reference), which all other estimators estimate."""
    placement: Literal["loss", "reward"] = "loss"
    """In the loss the KL has a gradient; in the reward it is subtracted token by token, before advantages."""
    target: float | None = None
    """KL in nats a token; when given, a controller moves the coefficient so that the KL stays near it."""
    horizon: int = 10_000
    """Trajectories over which the controller acts: a longer horizon moves the coefficient more slowly."""

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"kl.coef must be 0 or more, got {self.coef}")
        if self.target is not None and not (self.target > 0 and self.coef > 0):
            raise ValueError(
                f"kl.target needs target > 0 and a start kl.coef > 0, got {self.target}, {self.coef}"
            )
        if self.horizon < 1:
            raise ValueError(f"kl.horizon must be 1 or more, got {self.horizon}")
        if not 0 <= self.forward <= 1:
            raise ValueError(f"kl.forward must be from 0 to 1, got {self.forward}")
        if self.forward and self.estimator != "exact":
            raise ValueError(
                f"kl.forward needs kl.estimator exact, got {self.estimator}: sampled tokens of the policy "
                "estimate the reverse KL alone"
            )
        if self.coef and self.estimator == "k1" and self.placement == "loss":
            raise ValueError(
                "kl.estimator k1 in the loss has no expected gradient; use k2 or k3, or placement reward"
            )
        if self.coef and self.estimator == "exact" and self.placement == "reward":
            raise ValueError("kl.estimator exact belongs in the loss; in the reward use k1")

    @property
    def controller(self) -> AdaptiveKL | None:
        """The adaptive controller at its start; None where the coefficient is constant."""
        return None if self.target is None else AdaptiveKL(self.coef, self.target, self.horizon)


NO_KL = KL()
