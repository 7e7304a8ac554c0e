"""Training a reward model: a head of scores on a language model that goes on being one.

    pairs      mean of -log sigmoid(s_chosen - s_rejected) + lm_coef * mean of -logprob over the chosen tokens
    ratings    mean over the given ratings of 0.5 (s - rating)^2

The score of a text is the head on the state at its end-of-sequence token. Both texts of a pair go through the
model behind one copy of their prompt, as groups do in a run.

Differences from PPO-max (arXiv:2307.04964 section 3.2): 1. the likelihood is of the chosen completion, its
prompt left out; 2. batches have the paper's bounds of 4 and 128 pairs, how many tokens they are filled up to
is a setting, because the paper does not say; 3. the head starts at 0, the language-model head is not saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.algos.preference import bradley_terry, rating_loss
from rlhf.critic import scores, value_head
from rlhf.data import order
from rlhf.distributed import World
from rlhf.metrics import Mean, Metrics, merge
from rlhf.optimizer import MasterAdamW
from rlhf.packing import Packed, Unit, fill, pack
from rlhf.policy import Policy
from rlhf.pretrained import classifier_of
from rlhf.reward_model_config import RewardModelConfig
from rlhf.reward_model_data import Example


@dataclass(frozen=True, slots=True)
class Scored:
    """What one forward pass gives: scores `[S, K]`, and the states that predict each token."""

    scores: Tensor
    packed: Packed
    hidden: Tensor
    real: Tensor
    """bool `[N]`: False for the token put behind each completion, whose state is the one that is scored."""


class RewardModel:
    """A policy's trunk and head, and a head of `K` scores beside it."""

    def __init__(self, policy: Policy, num_scores: int) -> None:
        self.policy = policy
        device = policy.model.device
        size = value_head(policy.model, None, device).in_features
        self.head = value_head(policy.model, torch.zeros(num_scores, size, device=device), device)

    @property
    def module(self) -> nn.Module:
        return nn.ModuleDict({"model": self.policy.model, "head": self.head})

    def score(self, examples: Sequence[Example]) -> Scored:
        """The completions of all examples, in order, in one forward pass."""
        device = self.head.weight.device
        prompts = [torch.tensor(e.prompt.token_ids, device=device) for e in examples]
        # the state that predicts one more token is the state at the end
        completions = [[torch.tensor((*c, c[-1]), device=device) for c in e.completions] for e in examples]
        packed = pack(prompts, completions)
        lengths = torch.tensor([len(c) for group in completions for c in group], device=device)
        ends = lengths.cumsum(0) - 1
        hidden = self.policy.hidden(packed)
        real = torch.ones(len(hidden), dtype=torch.bool, device=device)
        real[ends] = False
        return Scored(scores(self.head, hidden[ends]), packed, hidden, real)

    def likelihood(self, scored: Scored, wanted: Tensor) -> Tensor:
        """Log-probs of the wanted tokens (bool `[N]`) by the language-model head."""
        only = replace(scored.packed, targets=scored.packed.targets[wanted])
        statistics = self.policy.statistics(
            only, temperature=1.0, want=("logprob",), hidden=scored.hidden[wanted]
        )
        assert statistics.logprob is not None
        return statistics.logprob

    def export(self, objectives: Sequence[str], pad_token_id: int) -> PreTrainedModel:
        """As `AutoModelForSequenceClassification` has it, in the compute type."""
        return classifier_of(self.policy.model, self.head.weight.detach(), objectives, pad_token_id)


class RewardModelLearner:
    """Batches of examples -> updates."""

    def __init__(
        self, model: RewardModel, optimizer: MasterAdamW, config: RewardModelConfig, world: World
    ) -> None:
        self.model, self.optimizer, self.config, self.world = model, optimizer, config, world

    def update(self, batch: Sequence[Example], *, step: int) -> Metrics:
        """One update from the examples of all ranks, of which this one computes its share."""
        mine = batch[self.world.rank :: self.world.size]
        parts = [self._accumulate(micro, batch) for micro in self._microbatches(mine)]
        return merge([*parts, self.optimizer.step(step, self.world)])

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
            "reward_model/accuracy": Mean(_right(chosen - rejected).sum().item(), count),
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
        everything = sum(value == value for example in batch for value in example.ratings)
        return loss / everything, {"reward_model/loss": Mean(loss.item(), rated)}

    def _microbatches(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        units = [Unit(i, 0, len(e.completions), e.tokens) for i, e in enumerate(examples)]
        for units_of_one in fill(units, self.config.learner.microbatch_tokens):
            yield [examples[unit.group] for unit in units_of_one]

    @torch.no_grad()
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """Of every completion of all examples, in order, `[S, K]` on the host; no rank does less."""
        found: dict[int, Tensor] = {}
        units = [Unit(i, 0, len(e.completions), e.tokens) for i, e in enumerate(examples)]
        for several in fill(units, self.config.learner.microbatch_tokens):
            scored = self.model.score([examples[unit.group] for unit in several]).scores.float().cpu()
            sizes = [len(examples[unit.group].completions) for unit in several]
            found |= {u.group: part for u, part in zip(several, torch.split(scored, sizes), strict=True)}
        return torch.cat([found[i] for i in range(len(examples))])


def next_batch(examples: Sequence[Example], config: RewardModelConfig, position: int) -> list[Example]:
    """The examples from `position` of an endless shuffled walk on, as many as fill `batch.tokens`."""
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
    """`[S, K]`, NaN where there is none."""
    return torch.tensor([e.ratings for e in examples], dtype=like.dtype, device=like.device)


def _right(margins: Tensor) -> Tensor:
    """A tie is right by half."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _chosen_tokens(packed: Packed) -> Tensor:
    """bool `[N]`: tokens of the first of the two completions of each prompt."""
    flags: list[Any] = [
        torch.full((length,), i == 0) for span in packed.spans for i, length in enumerate(span.completions)
    ]
    return torch.cat(flags).to(packed.targets.device)
