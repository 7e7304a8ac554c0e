"""`StepRewards`: which tokens earned the reward of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepRewards:
    """The steps of a sequence earned what is theirs, its last token the rest; together they are the reward.

    Four tokens with reward 1, of which the step that ends at the second earned .7 and one that ends at the
    third nothing: `at = NaN .7 0 NaN`, `rest = .3`.
    """

    at: Tensor
    """`[N]`: the reward of the step that ends at a token; NaN where none ends."""
    rest: Tensor  # [S]
