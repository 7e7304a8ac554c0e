"""The factor of each prompt's temperature, computed by a head on the reference's states of the prompt.

The head is fitted once, before the first step: it minimises the dual of `algos/prompt_temperature.py` on
the groups of the data. Each group has an optimum of its own; a head generalises over similar prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlhf.algos.prompt_temperature import PromptTemperature, factor_of
from rlhf.config.data import PromptValueConfig
from rlhf.distributed.world import World
from rlhf.learn.prompt_value import PromptNumbers
from rlhf.models.policy import Policy
from rlhf.torch_typed import numbers
from rlhf.types import Prompt


class PromptTemperatures(PromptNumbers):
    """Factors of temperatures: `values[prompt.id]` multiplies the algorithm's temperature."""

    what = "temperature"

    def __init__(
        self,
        section: PromptValueConfig,
        policy: Policy,
        prompts: Sequence[Prompt],
        temperature: PromptTemperature,
        exponents: Callable[[], Mapping[str, Tensor]],
        world: World,
        *,
        seed: int,
    ) -> None:
        """`exponents`: advantage / temperature of a prompt's completions in the data, `[G]` by prompt id."""
        super().__init__(section, policy, prompts, world, seed=seed)
        self.temperature, self.exponents = temperature, exponents

    def _learn(self) -> str:
        """Fits the head. Raises ValueError when no prompt of the data has two completions with a reward."""
        known = self.exponents()
        chosen = self._some([p for p in self.prompts if p.id in known])
        if not chosen:
            raise ValueError(
                "no prompt of the data has two completions with a reward, so no temperature can be picked"
            )
        groups = [known[p.id] for p in chosen]
        padded = nn.utils.rnn.pad_sequence(groups, batch_first=True)  # [P, G]
        sizes = torch.tensor([len(group) for group in groups], device=padded.device)  # [P]
        there = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]  # [P, G]
        dual = self.temperature.dual

        def loss(shares: Tensor, places: list[int]) -> Tensor:
            return dual(factor_of(shares), padded[places], there[places])

        reached = self._fit(chosen, loss, max_value=1.0)
        # the head gives shares of 0 to 1, which stand for factors on a logarithmic scale
        shares = torch.tensor(list(self.values.values()))
        self.values.update(zip(self.values, numbers(factor_of(shares)), strict=True))
        fixed = float(dual(torch.ones(len(groups), device=padded.device), padded, there).mean())
        factors = sorted(self.values.values())
        return (
            f"temperatures of {len(factors)} prompts, {factors[0]:.2f} to {factors[-1]:.2f} times the "
            f"algorithm's (median {statistics.median(factors):.2f}): dual {reached:.4f}, of the algorithm's "
            f"own {fixed:.4f}"
        )
