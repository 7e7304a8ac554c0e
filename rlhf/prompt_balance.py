"""The factor of each prompt's temperature, picked by a head on the reference's states of the prompt.

The head is fitted once, before the first step: it minimises the dual of `rlhf.algos.balance` on the data's
groups. A group by itself would name its own optimum; the head says what prompts like it have in common.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.algos.balance import Balance, factor_of
from rlhf.config import PromptValueConfig
from rlhf.distributed import World
from rlhf.experience import ExperienceBuilder
from rlhf.offline import OfflineData
from rlhf.policy import Policy
from rlhf.prompt_value import PromptNumbers
from rlhf.typed import numbers, pieces
from rlhf.types import Prompt


@dataclass(frozen=True, slots=True)
class DataExponents:
    """A / temperature of the data's completions, by prompt."""

    balance: Balance
    data: OfflineData
    experience: ExperienceBuilder

    def by_prompt(self) -> dict[str, Tensor]:
        """Of the prompts with at least two rewards, by id: one has nothing to balance."""
        groups = [g for g in self.data.groups if len(g.rewards) > 1]
        if not groups:
            return {}
        found = self.balance.exponents(self.experience.scores(groups))
        parts = pieces(found.float(), [len(g.rewards) for g in groups])
        return {g.prompt.id: part for g, part in zip(groups, parts, strict=True)}


class PromptBalance(PromptNumbers):
    """`values[prompt.id]` is the factor."""

    what = "balance"

    def __init__(
        self,
        section: PromptValueConfig,
        policy: Policy,
        prompts: Sequence[Prompt],
        exponents: DataExponents,
        world: World,
        *,
        seed: int,
    ) -> None:
        super().__init__(section, policy, prompts, world, seed=seed)
        self.exponents = exponents

    def _learn(self) -> str:
        """Raises ValueError when no prompt of the data has two completions with a reward."""
        known = self.exponents.by_prompt()
        chosen = self._some([p for p in self.prompts if p.id in known])
        if not chosen:
            raise ValueError("no prompt of the data has two completions with a reward, so none has a balance")
        parts = [known[p.id] for p in chosen]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        sizes = torch.tensor([len(part) for part in parts], device=padded.device)
        there = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
        dual = self.exponents.balance.dual

        def loss(shares: Tensor, places: list[int]) -> Tensor:
            return dual(factor_of(shares), padded[places], there[places])

        reached = self._fit(chosen, loss, max_value=1.0)
        shares = torch.tensor(list(self.values.values()))
        self.values.update(zip(self.values, numbers(factor_of(shares)), strict=True))
        fixed = float(dual(torch.ones(len(parts), device=padded.device), padded, there).mean())
        factors = sorted(self.values.values())
        return (
            f"temperatures of {len(factors)} prompts, {factors[0]:.2f} to {factors[-1]:.2f} times the "
            f"algorithm's (median {statistics.median(factors):.2f}): dual {reached:.4f}, of the algorithm's "
            f"own {fixed:.4f}"
        )
