"""Preference methods in which the model plays two parts.

`ofs_dpo` has a fast and a slow copy of it; chase.py has their loss, and what differs from the paper.

`srpo`: the model writes a first answer, and improves an answer that it is shown. With P(w is better than l)
and log-ratios to the reference, r(a) of a first answer and r(a|b) of a second one behind b:

    improver    (P - 1/2 - beta (r(w|l) - r(l|l)))^2, and the same with w and l exchanged and 1 - P
    both        (P - 1/2 - beta/2 (r(w|l) - r(l|w) + r(w) - r(l)))^2

The policy where all of them are 0 does not depend on who wrote the pairs. The paper's code was not to be
found: which term its weight alpha is of (here `mix`, of the second), and the values of alpha and beta. The
improver's two orders are averaged here, so that both terms are 1/4 at the start.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf.algos.algorithm import KL, NO_KL, Algorithm
from rlhf.algos.preference.chase import Chase
from rlhf.algos.preference.compares import squared
from rlhf.algos.preference.forms import revision
from rlhf.algos.preference.scores import log_ratio
from rlhf.algos.preference.table import changed, dpo, to_reference


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


def srpo(*, beta: float = 0.5, mix: float = 0.5, kl: KL = NO_KL) -> Algorithm:
    """The model learns to answer and to improve an answer, whoever wrote the pairs, arXiv:2406.01660."""
    if not 0.0 < mix <= 1.0:
        raise ValueError(f"mix must be above 0 and at most 1, got {mix}")
    return to_reference(log_ratio(beta), squared(0.5), kl, revision(mix))


TWO_ROLES: dict[str, Callable[..., Algorithm]] = {"ofs_dpo": ofs_dpo, "srpo": srpo}
