"""KL(policy || reference) from the sampled tokens alone, and the controller of its coefficient.

With d = logprobs - ref_logprobs on tokens sampled from the policy (Schulman,
http://joschu.net/blog/kl-approx.html):

    k1 = d                 no bias, both signs, noisy; expected gradient 0: for the reward, not the loss
    k2 = d^2 / 2           biased, but its gradient is that of KL(policy || reference)
    k3 = exp(-d) - 1 + d   no bias, never negative; its gradient is that of KL(reference || policy)
    k3_plus                the value of k3 with the gradient of k2

Guards, as in the published codes: -d is kept in [-20, 20] before the exponential and k3 in [0, 10]; beyond,
there is no gradient and, for k3, a bias (d below -2.6). The KL of the whole vocabulary ("exact") is computed
where the logits are, by `token_stats`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
