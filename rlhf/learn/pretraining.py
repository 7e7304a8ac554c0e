"""PPO-ptx: adds the negative log-likelihood of texts, which the policy is not to forget, to every update.

    loss += ptx.coef * mean of -logprob over the tokens of `ptx.samples` texts

    text           {"text": "..."}                          every token but the first is learned
    completions    {"prompt": ..., "completion": "..."}     the completion and its end token are learned

Which texts an update takes depends only on the seed and the update's number, so nothing has to be saved.

Differences from PPO-max (arXiv:2307.04964): 1. the paper does not state the weight, and its code sets it to
0, so the weight must be given; 2. the mean is over all tokens of the update, on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.config.learner import PtxConfig
from rlhf.data.order import order
from rlhf.data.texts import Text
from rlhf.distributed.world import World, derive_seed
from rlhf.metrics import Mean, Metrics, merge
from rlhf.models.packing import Unit, fill, pack
from rlhf.models.policy import Policy
from rlhf.models.sharding import in_step


class Pretraining:
    """Adds the gradient of the texts' loss to the gradient of an update."""

    def __init__(
        self,
        texts: Sequence[Text],
        section: PtxConfig,
        policy: Policy,
        world: World,
        *,
        seed: int,
        budget: int,
    ) -> None:
        """`budget`: tokens of one forward pass."""
        assert section.coef is not None and section.samples is not None
        self.texts, self.policy, self.world = texts, policy, world
        self.coef, self.samples = section.coef, section.samples
        self.seed, self.budget = derive_seed(seed, "ptx") % 2**32, budget

    def accumulate(self, update: int) -> Metrics:
        """Adds the gradient for one update; `update` is its number in the whole run, from 0."""
        draw = order(self.seed, len(self.texts), update * self.samples, self.samples)
        total = sum(len(self.texts[i].learned) for i in draw)
        mine = [self.texts[i] for i in draw[self.world.rank :: self.world.size]]
        units = [Unit(i, 0, 1, text.tokens) for i, text in enumerate(mine)]
        metrics: list[Metrics] = [{"ptx/loss": Mean(0.0, 0.0)}]
        for several in in_step(fill(units, self.budget), self.policy.model, self.world):
            if several is None:
                torch.autograd.backward([self.policy.dummy_pass()])
                continue
            metrics.append(self._one_pass([mine[unit.group] for unit in several], total))
        return merge(metrics)

    def _one_pass(self, texts: Sequence[Text], total: int) -> Metrics:
        device = self.policy.model.device
        packed = pack(
            [torch.tensor(t.given, device=device) for t in texts],
            [[torch.tensor(t.learned, device=device)] for t in texts],
        )
        logprob = self.policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
        assert logprob is not None
        loss = -logprob.sum()
        torch.autograd.backward([self.coef * loss / total])
        return {"ptx/loss": Mean(loss.item(), float(len(logprob)))}
