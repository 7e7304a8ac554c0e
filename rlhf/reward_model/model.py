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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.data.pairs import Example
from rlhf.models.heads import scores, value_head
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import classifier_of


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
