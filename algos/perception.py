"""The perception loss of PAPO (arXiv:2507.06448): rewards a policy whose answers depend on the images.

    loss = ... - coef * reduce(kl)
           + entropy_coef * reduce(entropy) + masked_entropy_coef * reduce(masked_entropy)

kl is KL(policy given the image || policy given the image with patches made black), on completions that were
sampled with the whole image. It is maximised and both entropies are minimised: without these, the policy can
raise the KL by irrelevant tokens. `reduce` is the algorithm's own, over every token of the update; tokens of
prompts without images count as zeros.

Differences from the paper: 1. the KL is k3 of the policy's own samples, exp(u) - u - 1 with u = masked -
plain log-probability, as in its code; its figure prints the inverted ratio. 2. `gradient: policy`, the
default of the code: masked log-probabilities are from before the update, so the masked entropy has no
gradient; with `both` they are of now, with gradient. 3. `estimator: exact`, ours, is the KL of the whole
vocabulary against the masked policy of now, which has no gradient. 4. The code's top fifth of tokens by KL
and its loss on correct completions are left out (for the latter there is VAPO's `imitation_coef`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.algos.kl import k3
from rlhf.metrics import Max, Mean, Metrics
from rlhf.types import LossInputs


class PerceptionTerms(NamedTuple):
    """The terms of each token, `[N]`, 0 outside the loss mask."""

    kl: Tensor
    entropy: Tensor
    masked_entropy: Tensor


def perception_terms(
    logprobs: Float[Tensor, " N"],
    masked_logprobs: Float[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    *,
    max_kl: float | None = None,
) -> PerceptionTerms:
    """KL(policy || policy given the masked image) and the entropies of both, from the sampled tokens.

    `max_kl` bounds the KL of a token (PAPO's code has 0.2 as an option, which is off). `loss_mask` must be
    False for samples without an image.
    """
    plain = logprobs.masked_fill(~loss_mask, 0.0)
    masked = masked_logprobs.masked_fill(~loss_mask, 0.0)
    kl = k3(plain, masked)
    return PerceptionTerms(kl if max_kl is None else kl.clamp(max=max_kl), -plain, -masked)


@dataclass(frozen=True, slots=True)
class Perception:
    """The perception part of an algorithm's loss; the fields are settings of the section `perception`."""

    coef: float
    entropy_coef: float = 0.0
    masked_entropy_coef: float = 0.0
    estimator: Literal["k3", "exact"] = "k3"
    gradient: Literal["policy", "both"] = "policy"
    max_kl: float | None = None

    def loss(self, batch: LossInputs, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Metrics]:
        """This microbatch's share of the perception loss, and its metrics; `batch.perception` must be
        given."""
        given = batch.perception
        assert given is not None
        mask = batch.loss_mask & given.has_image
        terms = perception_terms(batch.logprobs, given.masked_logprobs, mask, max_kl=self.max_kl)
        kl = terms.kl
        if self.estimator == "exact":
            assert given.exact_kl is not None
            kl = given.exact_kl.masked_fill(~mask, 0.0)
            kl = kl if self.max_kl is None else kl.clamp(max=self.max_kl)
        loss = (
            self.entropy_coef * reduce(terms.entropy)
            + self.masked_entropy_coef * reduce(terms.masked_entropy)
            - self.coef * reduce(kl)
        )
        return given.scale * loss, self._report(batch, terms, mask, given.scale)

    @torch.no_grad()
    def _report(self, batch: LossInputs, terms: PerceptionTerms, mask: Tensor, scale: float) -> Metrics:
        assert batch.perception is not None
        kl, exact = terms.kl, batch.perception.exact_kl
        sums = [mask.sum().to(kl.dtype), kl.sum(), kl.square().sum(), *(t.sum() for t in terms[1:])]
        if exact is not None:
            sums.append(exact.masked_fill(~mask, 0.0).sum())
        count, value, squared, entropy, masked_entropy, *rest = (
            float(x) for x in torch.stack(sums).cpu().unbind()
        )
        metrics: Metrics = {
            "perception/kl": Mean(value, count),
            "perception/kl_squared": Mean(squared, count),
            "perception/entropy": Mean(entropy, count),
            "perception/masked_entropy": Mean(masked_entropy, count),
            "perception/coef": Max(scale * self.coef),
        }
        if rest:
            metrics["perception/kl_exact"] = Mean(rest[0], count)
        return metrics
