"""Preference methods in which the model plays two parts: a fast and a slow copy of it (`ofs_dpo`).

chase.py has the loss of the two copies, and what differs from the paper.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf.algos.algorithm import KL, NO_KL, Algorithm
from rlhf.algos.preference.chase import Chase
from rlhf.algos.preference.table import changed, dpo


def ofs_dpo(
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
    lr_ratio: float = 0.3,
    interval: int = 50,
    kl: KL = NO_KL,
) -> Algorithm:
    """DPO of two adapters, a fast and a slow one, that spur each other on, arXiv:2406.05534."""
    return changed(dpo(beta=beta, kl=kl), chase=Chase(alpha, lr_ratio, interval))


TWO_ROLES: dict[str, Callable[..., Algorithm]] = {"ofs_dpo": ofs_dpo}
