"""The reward model: a head with K scores on a language model that keeps its own head.

What it learns is the matter of a kind (rlhf/reward_model/kinds/). The score of a completion is the head
applied to the hidden state at its end-of-sequence token. The completions of an example share one copy of
their prompt in the packed batch, as the groups of a rollout do.

Differences from PPO-max (arXiv:2307.04964 section 3.2): 1. the language-model loss is over the chosen
completion without its prompt; 2. batches have the paper's bounds of 4 and 128 pairs, but the number of tokens
that fills a batch is a setting (`batch.tokens`), because the paper does not give it; 3. the head starts at 0,
and the language-model head is not exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.pairs import Example
from rlhf.models.classifier import Classifier
from rlhf.models.heads import scores, value_head
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy


@dataclass(frozen=True, slots=True)
class Scored:
    """What one forward pass returns."""

    scores: Tensor
    """`[S, K]`: of each of the S places that the examples have (`Example.scored`), in order."""
    packed: Packed
    hidden: Tensor
    """`[N, H]`: the hidden states that predict each token."""
    real: Tensor
    """bool `[N]`: False for the token appended to each completion, whose state is the one that is scored."""
    places: Tensor
    """`[S]`: index into N of the states that are scored."""


class RewardModel:
    """A language model (trunk and head) and a second head with K scores."""

    def __init__(self, policy: Policy, num_scores: int) -> None:
        self.policy = policy
        device = policy.model.device
        size = value_head(policy.model, None, device).in_features
        self.head = value_head(policy.model, torch.zeros(num_scores, size, device=device), device)

    @property
    def module(self) -> nn.Module:
        """Everything that is trained."""
        return nn.ModuleDict({"model": self.policy.model, "head": self.head})

    def score(self, examples: Sequence[Example]) -> Scored:
        """Scores the completions of all examples, in order, in one forward pass."""
        device = self.head.weight.device
        prompts = [torch.tensor(e.prompt.token_ids, device=device) for e in examples]
        # one token is appended (its value does not matter): the state that predicts it is that at the end
        completions = [[torch.tensor((*c, c[-1]), device=device) for c in e.completions] for e in examples]
        packed = pack(prompts, completions, [e.prompt.pictures for e in examples])
        hidden = self.policy.hidden(packed)
        real = torch.ones(len(hidden), dtype=torch.bool, device=device)
        places: list[int] = []
        start = 0
        for example in examples:
            for completion, scored in zip(example.completions, example.scored, strict=True):
                # the state at a token is the one that predicts the next
                places += [start + place + 1 for place in scored]
                start += len(completion) + 1
                real[start - 1] = False
        index = torch.tensor(places, device=device)
        return Scored(scores(self.head, hidden[index]), packed, hidden, real, index)

    def likelihood(self, scored: Scored, wanted: Tensor) -> Tensor:
        """Log-probs of the tokens where `wanted` (bool `[N]`) is True, by the language-model head."""
        only = replace(scored.packed, targets=scored.packed.targets[wanted])
        statistics = self.policy.statistics(
            only, temperature=1.0, want=("logprob",), hidden=scored.hidden[wanted]
        )
        assert statistics.logprob is not None
        return statistics.logprob

    def export(self, objectives: Sequence[str], pad_token_id: int, entries: Mapping[str, Any]) -> Classifier:
        """What is saved, in `model.dtype`; `entries` of its config say how it is read."""
        return Classifier(self.policy.model, self.head.weight.detach(), objectives, pad_token_id, entries)
