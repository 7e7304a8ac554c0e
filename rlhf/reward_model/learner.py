"""Updates of a reward model: batches of pairs or ratings, their loss, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.algos.reward_model import bradley_terry, rating_loss
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.order import order
from rlhf.data.pairs import Example
from rlhf.distributed.world import World
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Mean, Metrics, merge
from rlhf.models.packing import Packed, Unit, fill
from rlhf.reward_model.model import RewardModel, Scored


class RewardModelLearner:
    """Makes updates from batches of examples, and scores examples."""

    def __init__(
        self, model: RewardModel, optimizer: MasterAdamW, config: RewardModelConfig, world: World
    ) -> None:
        self.model, self.optimizer, self.config, self.world = model, optimizer, config, world

    def update(self, batch: Sequence[Example], *, step: int) -> Metrics:
        """One update. `batch` has the examples of all ranks; each computes the gradient of its share."""
        mine = batch[self.world.rank :: self.world.size]
        metrics = [self._accumulate(micro, batch) for micro in self._microbatches(mine)]
        return merge([*metrics, self.optimizer.step(step, self.world)])

    def _accumulate(self, micro: Sequence[Example], batch: Sequence[Example]) -> Metrics:
        scored = self.model.score(micro)
        if self.config.score.kind == "ratings":
            loss, metrics = self._ratings(scored, micro, batch)
        else:
            loss, metrics = self._pairs(scored, micro, batch)
        torch.autograd.backward([loss])
        return metrics

    def _pairs(
        self, scored: Scored, micro: Sequence[Example], batch: Sequence[Example]
    ) -> tuple[Tensor, Metrics]:
        chosen, rejected = scored.scores[0::2, 0], scored.scores[1::2, 0]
        loss = bradley_terry(chosen, rejected).sum()
        count = float(len(micro))
        metrics: Metrics = {
            "reward_model/loss": Mean(loss.item(), count),
            "reward_model/accuracy": Mean(_correct(chosen - rejected).sum().item(), count),
            "reward_model/margin": Mean((chosen - rejected).sum().item(), count),
        }
        total = loss / len(batch)
        if self.config.lm_coef:
            wanted = scored.real & _chosen_tokens(scored.packed)
            nll = -self.model.likelihood(scored, wanted).sum()
            metrics["reward_model/lm_loss"] = Mean(nll.item(), float(wanted.sum()))
            total = total + self.config.lm_coef * nll / sum(len(e.completions[0]) for e in batch)
        return total, metrics

    def _ratings(
        self, scored: Scored, micro: Sequence[Example], batch: Sequence[Example]
    ) -> tuple[Tensor, Metrics]:
        ratings = ratings_of(micro, scored.scores)
        loss = rating_loss(scored.scores, ratings).sum()
        rated = float((~ratings.isnan()).sum())
        # a rating that is not given is NaN, which does not equal itself
        given = sum(value == value for example in batch for value in example.ratings)
        return loss / given, {"reward_model/loss": Mean(loss.item(), rated)}

    def _microbatches(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        units = [Unit(i, 0, len(e.completions), e.tokens) for i, e in enumerate(examples)]
        for units_of_one in fill(units, self.config.learner.microbatch_tokens):
            yield [examples[unit.group] for unit in units_of_one]

    @torch.no_grad()
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """Scores `[S, K]` of all completions, in order, on the CPU. Every rank computes all of them."""
        found: dict[int, Tensor] = {}
        units = [Unit(i, 0, len(e.completions), e.tokens) for i, e in enumerate(examples)]
        for several in fill(units, self.config.learner.microbatch_tokens):
            scored = self.model.score([examples[unit.group] for unit in several]).scores.float().cpu()
            sizes = [len(examples[unit.group].completions) for unit in several]
            found |= {u.group: part for u, part in zip(several, torch.split(scored, sizes), strict=True)}
        return torch.cat([found[i] for i in range(len(examples))])


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


def ratings_of(examples: Sequence[Example], like: Tensor) -> Tensor:
    """Ratings `[S, K]`, NaN where an example has none for an objective."""
    return torch.tensor([e.ratings for e in examples], dtype=like.dtype, device=like.device)


def _correct(margins: Tensor) -> Tensor:
    """1 for each positive margin, 0.5 for a tie, 0 for a negative margin."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _chosen_tokens(packed: Packed) -> Tensor:
    """bool `[N]`: the tokens of the chosen completion, which is the first of each pair."""
    flags: list[Any] = [
        torch.full((length,), i == 0) for span in packed.spans for i, length in enumerate(span.completions)
    ]
    return torch.cat(flags).to(packed.targets.device)
