"""Updates of a reward model: batches of examples, their loss, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.order import order
from rlhf.data.pairs import Example
from rlhf.distributed.world import World
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Metrics, merge
from rlhf.models.packing import Unit, fill
from rlhf.reward_model.kinds.base import Batch, Kind
from rlhf.reward_model.model import RewardModel


class RewardModelLearner:
    """Makes updates from batches of examples, and scores examples."""

    def __init__(
        self,
        model: RewardModel,
        kind: Kind,
        optimizer: MasterAdamW,
        config: RewardModelConfig,
        world: World,
    ) -> None:
        self.model, self.kind, self.optimizer, self.world = model, kind, optimizer, world
        self.microbatch_tokens = config.learner.microbatch_tokens

    def update(self, examples: Sequence[Example], *, step: int) -> Metrics:
        """One update from the examples of all ranks; each computes the gradient of its share."""
        mine, batch = examples[self.world.rank :: self.world.size], Batch(examples, step)
        metrics = [self.accumulate(micro, batch) for micro in self.microbatches(mine)]
        return merge([*metrics, self.optimizer.step(step, self.world)])

    def accumulate(self, micro: Sequence[Example], batch: Batch) -> Metrics:
        """Adds the gradient of some examples of a batch; returns their metrics."""
        loss, metrics = self.kind.loss(self.model, self.model.score(micro), micro, batch)
        torch.autograd.backward([loss])
        return metrics

    def microbatches(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """Cuts examples into passes of at most `learner.microbatch_tokens` tokens."""
        for places in packed(examples, self.microbatch_tokens):
            yield [examples[i] for i in places]

    @torch.no_grad()
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """Scores `[S, K]` of all completions, in order, on the CPU. Every rank computes all of them."""
        found: dict[int, Tensor] = {}
        for places in packed(examples, self.microbatch_tokens):
            several = [examples[i] for i in places]
            scored = self.model.score(several).scores.float().cpu()
            parts = torch.split(scored, [e.num_scored for e in several])
            found |= dict(zip(places, parts, strict=True))
        return torch.cat([found[i] for i in range(len(examples))])


def packed(examples: Sequence[Example], budget: int) -> Iterator[list[int]]:
    """The numbers of examples that go through the model together, in passes of at most `budget` tokens."""
    units = [Unit(i, 0, len(e.completions), e.tokens) for i, e in enumerate(examples)]
    for several in fill(units, budget):
        yield [unit.group for unit in several]


def next_batch(examples: Sequence[Example], config: RewardModelConfig, position: int) -> list[Example]:
    """The examples of one update: up to `batch.tokens` tokens, from `position` in an endless shuffle."""
    batch: list[Example] = []
    tokens = 0
    while len(batch) < config.batch.high:
        (index,) = order(config.seed, len(examples), position + len(batch), 1)
        tokens += examples[index].tokens
        if tokens > config.batch.tokens and len(batch) >= config.batch.low:
            break
        batch.append(examples[index])
    return batch
