"""`FrozenStates`: the hidden states of examples by a model that is not trained, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.pairs import Example
from rlhf.distributed.world import World
from rlhf.models.sharding import in_step
from rlhf.reward_model.learner import packed
from rlhf.reward_model.model import RewardModel
from rlhf.torch_typed import pieces

AT_ONCE = 512
"""Examples whose states ranks send each other at a time."""


@dataclass(frozen=True, slots=True)
class States:
    """The hidden states of an example, in float32."""

    prompt: Tensor
    """`[H]`: at the last token of the prompt."""
    ends: Tensor
    """`[s, H]`: at the places that are scored."""


class FrozenStates:
    """Keeps the states of every example that was asked for: 4 H bytes a prompt and a place, on every rank.

    Ranks share the passes, so all of them ask for the same examples at the same time.
    """

    def __init__(self, model: RewardModel, microbatch_tokens: int, world: World) -> None:
        """`microbatch_tokens`: the most tokens of one pass."""
        self.model, self.microbatch_tokens, self.world = model, microbatch_tokens, world
        self.known: dict[int, States] = {}
        """By the `id()` of an example: the run keeps its examples, so that no two have the same."""

    def of(self, examples: Sequence[Example], *, keep: bool = True) -> list[States]:
        """The states of examples, in order; `keep`: whether they will be asked for again."""
        # a batch may have an example twice
        missing = {id(e): e for e in examples if id(e) not in self.known}
        several, found = list(missing.values()), dict[int, States]()
        for start in range(0, len(several), AT_ONCE):
            some = several[start : start + AT_ONCE]
            found |= zip(map(id, some), self._computed(some), strict=True)
        if keep:
            self.known |= found
        return [found[id(e)] if id(e) in found else self.known[id(e)] for e in examples]

    @torch.no_grad()
    def _computed(self, examples: Sequence[Example]) -> list[States]:
        world, found = self.world, dict[int, States]()
        own = range(len(examples))[world.rank :: world.size]
        passes = packed([examples[i] for i in own], self.microbatch_tokens)
        for places in in_step(passes, self.model.policy.model, world):
            several = [examples[own[i]] for i in places] if places else [examples[0]]
            computed = self._states(several)
            found |= zip([own[i] for i in places or ()], computed, strict=False)
        if world.size > 1:
            device = self.model.head.weight.device
            moved = {i: (s.prompt.cpu(), s.ends.cpu()) for i, s in found.items()}
            for of_rank in world.gather(moved):
                found |= {i: States(p.to(device), e.to(device)) for i, (p, e) in of_rank.items()}
        return [found[i] for i in range(len(examples))]

    def _states(self, examples: Sequence[Example]) -> list[States]:
        """The states of examples that go through the model together."""
        scored = self.model.score(examples)
        ends = pieces(scored.hidden[scored.places].float(), [e.num_scored for e in examples])
        found: list[States] = []
        start = 0
        for example, of_one in zip(examples, ends, strict=True):
            # the last token of the prompt predicts the first one of the completion
            found.append(States(scored.hidden[start].float().clone(), of_one))
            start += sum(len(c) + 1 for c in example.completions)
        return found
