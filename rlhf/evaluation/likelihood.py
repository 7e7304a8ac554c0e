"""Likelihood diagnostics: mass and entropy of the k most probable next tokens (arXiv:2410.11677, 4.3).

A sustained fall of them while the margin of the pairs still grows is that paper's sign that a preference
loss is over-optimised. The paper gives neither k nor says whether the k probabilities are renormalised, so
both entropies are computed, with k = 10.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.models.heads import Head
from rlhf.models.packing import Microbatch

TOP = 10
"""The k of "top-k"."""
CHUNK = 512
"""Tokens whose logits exist at the same time."""


class Likelihood(NamedTuple):
    """Means over the tokens of a completion, or over completions."""

    mass: float
    """Sum of the k largest probabilities."""
    entropy: float
    """-sum p log p over them, in nats."""
    entropy_normalised: float
    """The same after they are divided by their sum."""


def topk_likelihood(logits: Tensor, k: int = TOP) -> Tensor:
    """Mass, entropy and normalised entropy of the k most probable tokens `[n, 3]`, from logits `[n, V]`.

    Of a vocabulary of fewer than k tokens it takes all.
    """
    largest = logits.topk(min(k, logits.shape[-1]), dim=-1).values
    p = (largest - logits.logsumexp(-1, keepdim=True)).exp()  # [n, k]
    mass = p.sum(-1)
    return torch.stack([mass, _entropy(p), _entropy(p / mass[:, None])], -1)


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p `[n]` of `p` `[n, k]`, where 0 log 0 is 0."""
    return -torch.xlogy(p, p).sum(-1)


class TopK:
    """Collects `topk_likelihood` of some tokens of packed groups; `sequence_logprobs` calls it as `seen`."""

    def __init__(self, head: Head, wanted: Tensor, temperature: float) -> None:
        """`wanted`: bool `[N]`, the tokens to measure."""
        self.head, self.wanted, self.temperature = head, wanted, temperature
        self.found = torch.zeros(len(wanted), 3, device=wanted.device)
        """`[N, 3]`; zeros where not wanted."""

    def __call__(self, micro: Microbatch, hidden: Tensor) -> None:
        for rows in torch.split(self.wanted[micro.index].nonzero()[:, 0], CHUNK):
            logits = self.head.logits(hidden[rows]).div_(self.temperature)
            self.found[micro.index[rows]] = topk_likelihood(logits)
