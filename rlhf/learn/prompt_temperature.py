"""The factor of each prompt's temperature, picked by a head on the reference's states of the prompt.

The head is fitted once, before the first step: it minimises the dual of `algos/prompt_temperature.py` on
the groups of the data. A group by itself would name its own optimum; the head says what prompts like it
have in common.
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
    """`values[prompt.id]` is the factor."""

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
        """`exponents`: advantage / temperature of the data's completions `[G]`, by the prompt's id."""
        super().__init__(section, policy, prompts, world, seed=seed)
        self.temperature, self.exponents = temperature, exponents

    def _learn(self) -> str:
        """Raises ValueError when no prompt of the data has two completions with a reward."""
        known = self.exponents()
        chosen = self._some([p for p in self.prompts if p.id in known])
        if not chosen:
            raise ValueError(
                "no prompt of the data has two completions with a reward, so no temperature can be picked"
            )
        parts = [known[p.id] for p in chosen]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        sizes = torch.tensor([len(part) for part in parts], device=padded.device)
        there = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
        dual = self.temperature.dual

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
