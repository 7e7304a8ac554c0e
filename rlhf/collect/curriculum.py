"""Which prompts a step draws: in the order of shuffled epochs, or by a curriculum from easy to hard.

    key_i = -(s_i - target)^2 / (2 SPREAD^2) + Gumbel noise       those with the largest keys are drawn

s_i is the success rate that the run has measured of prompt i (rlhf/collect/budgets.py keeps the record), with
one success and one failure added, so that a prompt never seen has 1/2. `target` falls in a straight line from
1 at the first step to 0 at the last: easy prompts come first, then those that are solved half of the time,
then the hard ones. The largest keys are a sample without replacement with probabilities in proportion to
exp(key without noise), a Gaussian around the target as in the curriculum of arXiv:2506.06632; there levels
of difficulty are given, here success is measured while it learns. What is drawn depends on seed, position,
step and the record alone, so every rank finds the same and a resumed run goes on exactly.
"""

from __future__ import annotations

import numpy as np

from rlhf.algos.budget import SuccessTracker
from rlhf.config.run import Config
from rlhf.data.identity import identity
from rlhf.data.order import order
from rlhf.data.prompts import PromptDataset
from rlhf.types import Prompt

SPREAD = 0.25
"""Width of the Gaussian: at success rates this far from the target, 61% of its height."""


class PromptOrder:
    """Draws the prompts of a step."""

    def __init__(self, config: Config, prompts: PromptDataset, success: SuccessTracker) -> None:
        self.prompts, self.success, self.seed = prompts, success, config.seed
        self.has_curriculum = config.data.curriculum == "easy_to_hard"
        self.last_step = max(config.steps - 1, 1)
        self.names = [identity(p) for p in prompts.prompts] if self.has_curriculum else []

    def __call__(self, position: int, count: int, step: int) -> list[Prompt]:
        """The prompts at the places `position` to `position + count - 1` of the run, for `step` (from 0)."""
        if not self.has_curriculum:
            return [self.prompts[i] for i in order(self.seed, len(self.prompts), position, count)]
        target = 1.0 - min(step / self.last_step, 1.0)
        rates = np.array([self.success.smoothed(name) for name in self.names])
        noise = np.random.Philox(np.random.SeedSequence([self.seed, 0, position])).random_raw(len(rates))
        # 53 bits, as of a double, and never 0 or 1
        uniform = ((noise >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        keys = -((rates - target) ** 2) / (2 * SPREAD**2) - np.log(-np.log(uniform))
        drawn = np.argsort(-keys, kind="stable")
        # more prompts than there are: the same ones again
        return [self.prompts[int(drawn[i % len(drawn)])] for i in range(count)]
