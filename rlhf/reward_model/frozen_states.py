"""`FrozenStates`: the hidden states of examples by a model that is not trained, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.pairs import Example
from rlhf.reward_model.learner import packed
from rlhf.reward_model.model import RewardModel
from rlhf.torch_typed import pieces


@dataclass(frozen=True, slots=True)
class States:
    """The hidden states of an example, in float32."""

    prompt: Tensor
    """`[H]`: at the last token of the prompt."""
    ends: Tensor
    """`[s, H]`: at the places that are scored."""


class FrozenStates:
    """Keeps the states of every example that was asked for: 4 H bytes a prompt and a place."""

    def __init__(self, model: RewardModel, microbatch_tokens: int) -> None:
        """`microbatch_tokens`: the most tokens of one pass."""
        self.model, self.microbatch_tokens = model, microbatch_tokens
        self.known: dict[int, States] = {}
        """By the `id()` of an example: the run keeps its examples, so that no two have the same."""

    def of(self, examples: Sequence[Example], *, keep: bool = True) -> list[States]:
        """The states of examples, in order; `keep`: whether they will be asked for again."""
        # a batch may have an example twice
        missing = {id(e): e for e in examples if id(e) not in self.known}
        found = dict(zip(missing, self._computed(list(missing.values())), strict=True))
        if keep:
            self.known |= found
        return [found[id(e)] if id(e) in found else self.known[id(e)] for e in examples]

    @torch.no_grad()
    def _computed(self, examples: Sequence[Example]) -> list[States]:
        found: dict[int, States] = {}
        for places in packed(examples, self.microbatch_tokens):
            several = [examples[i] for i in places]
            scored = self.model.score(several)
            ends = pieces(scored.hidden[scored.places].float(), [e.num_scored for e in several])
            start = 0
            for place, example, of_one in zip(places, several, ends, strict=True):
                # the last token of the prompt predicts the first one of the completion
                found[place] = States(scored.hidden[start].float().clone(), of_one)
                start += sum(len(c) + 1 for c in example.completions)
        return [found[i] for i in range(len(examples))]
