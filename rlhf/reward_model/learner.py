"""Updates of a reward model, trunk and head: batches of examples, their loss, and the optimizer's step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.checkpoints.store import Saves
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.order import order
from rlhf.data.pairs import Example
from rlhf.distributed.world import World
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Metrics, merge
from rlhf.models.packing import Unit, fill
from rlhf.models.policy import Policy
from rlhf.models.sharding import in_step
from rlhf.reward_model.kinds.base import Kind, Learner
from rlhf.reward_model.model import RewardModel, Scored


@dataclass(frozen=True, slots=True)
class Batch:
    """What one update learns from: the examples of all ranks, and the number of the update (from 0)."""

    examples: Sequence[Example]
    step: int


class TrainedKind(Kind):
    """A kind whose loss trains the whole model: the trunk and the head."""

    @abstractmethod
    def loss(
        self, model: RewardModel, scored: Scored, micro: Sequence[Example], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        """The part of the loss that some examples of a batch have, and their metrics.

        Its denominators count the whole batch: the losses of all parts and ranks add up to that of the batch.
        """

    def learner(self, policy: Policy, world: World, first: Sequence[Example]) -> RewardModelLearner:
        config = self.config
        model = RewardModel(policy, len(config.score.objectives))
        dtype = getattr(torch, config.model.dtype)
        optimizer = MasterAdamW(model.module, dtype, config.learner, config.steps)
        if config.model.gradient_checkpointing:
            policy.checkpoint_activations()
        return RewardModelLearner(model, self, optimizer, world)


class RewardModelLearner(Learner):
    """Makes updates from batches of examples, and scores examples."""

    def __init__(self, model: RewardModel, kind: TrainedKind, optimizer: MasterAdamW, world: World) -> None:
        self.model, self.kind, self.optimizer, self.world = model, kind, optimizer, world
        self.microbatch_tokens = kind.config.learner.microbatch_tokens

    def update(self, examples: Sequence[Example], *, step: int) -> Metrics:
        mine, batch = examples[self.world.rank :: self.world.size], Batch(examples, step)
        metrics: list[Metrics] = []
        for micro in in_step(self.microbatches(mine), self.model.policy.model, self.world):
            if micro is None:
                self._empty_pass(batch)
            else:
                metrics.append(self.accumulate(micro, batch))
        return merge([*metrics, self.optimizer.step(step, self.world)])

    def _empty_pass(self, batch: Batch) -> None:
        """Takes part in a pass of a sharded model without adding to the gradient."""
        # the loss itself, so that it depends on the weights that those of the other ranks depend on
        example = min(batch.examples, key=lambda e: e.tokens)
        loss, _ = self.kind.loss(self.model, self.model.score([example]), [example], batch)
        torch.autograd.backward([loss * 0.0])

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
        found: dict[int, Tensor] = {}
        own = range(len(examples))[self.world.rank :: self.world.size]
        passes = packed([examples[i] for i in own], self.microbatch_tokens)
        for places in in_step(passes, self.model.policy.model, self.world):
            several = [examples[own[i]] for i in places or [0]]
            scored = self.model.score(several).scores.float().cpu()
            parts = torch.split(scored, [e.num_scored for e in several])
            found |= zip([own[i] for i in places or ()], parts, strict=False)
        of_all = {place: part for of_rank in self.world.gather(found) for place, part in of_rank.items()}
        return torch.cat([of_all[i] for i in range(len(examples))])

    def export(self, pad_token_id: int) -> Saves:
        return self.model.export(self.kind.config.score.objectives, pad_token_id, self.kind.saved)


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
