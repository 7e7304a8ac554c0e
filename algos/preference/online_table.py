"""Preference methods that sample from, or compare with, a frozen model: the reference or the iterate.

`rollout.samplers` says what samples, `iteration` which earlier policy is kept, `pairs` what is compared;
configs/ has a file for each. The iterate is the policy of the last iteration. Differences from papers and
codes: 1. `xpo` and `selm` pull by the mean log-prob of what the named model sampled for a prompt, once for
each comparison, and a prompt whose completions tie has no pull (XPO's paper sums over the data of all
iterations; TRL and oat, as here, over the batch); 2. `dno` and `sppo` take P from the run's labels
(`pairs.labels`), whatever gives them; 3. `spac` is the closed form of the paper's game, whose last term the
paper wraps in a log-sigmoid that it does not print: here log(1 + e^z), which has half the slope at 0; 4.
`nash_md` subtracts from a token the penalties of all later tokens too, as the paper recommends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from rlhf.algos import surrogate
from rlhf.algos.advantage import leave_one_out, own_only, per_sequence, preference_to_go
from rlhf.algos.algorithm import KL, NO_KL, Algorithm, Mismatch
from rlhf.algos.preference import compares, scores
from rlhf.algos.preference.checks import check_above_zero
from rlhf.algos.preference.compares import Compare
from rlhf.algos.preference.forms import Form, against_own, pairs, singles
from rlhf.algos.preference.losses import Preference, away_from, below_data
from rlhf.algos.preference.scores import Score
from rlhf.algos.preference.table import changed, comparing, dpo
from rlhf.algos.ratio import TOKEN_TIS, token_ratio
from rlhf.algos.reduction import own_mean_token_sum, sequence_mean_token_sum
from rlhf.algos.shaping import Selection
from rlhf.types import Source

ITERATE = frozenset({"iterate"})
HYPO_KL = KL(coef=1e-3, estimator="k1", placement="reward")
NASH_KL = KL(coef=0.008, estimator="k1", placement="reward")


def to_iterate(beta: float, compare: Compare, kl: KL, form: Form = pairs) -> Algorithm:
    """A method whose reference is the policy of the last iteration."""
    score: Score = scores.to_iterate(beta)
    return comparing(Preference(form=form, score=score, compare=compare, uses=ITERATE), kl)


# laid out by hand: one algorithm is one short paragraph
# fmt: off


def xpo(*, beta: float = 0.1, alpha: float = 1e-5, kl: KL = NO_KL) -> Algorithm:
    """Online DPO that makes what the reference samples less likely, arXiv:2405.21046."""
    return changed(dpo(beta=beta, kl=kl), pull=away_from(Source.REFERENCE, alpha))


def selm(*, beta: float = 0.01, alpha: float = 0.001, kl: KL = NO_KL) -> Algorithm:
    """DPO that makes what the iterate samples less likely, by alpha beta, arXiv:2405.19332."""
    return changed(dpo(beta=beta, kl=kl), pull=away_from(Source.ITERATE, alpha * beta))


def sppo(*, beta: float = 0.1, kl: KL = NO_KL) -> Algorithm:
    """Each completion's log-ratio to the iterate becomes (P(it wins) - 1/2) / beta, arXiv:2405.00675."""
    check_above_zero(beta=beta)
    return to_iterate(1.0, compares.squared(0.5 / beta), kl, singles())


def dno(*, eta: float = 0.1, kl: KL = NO_KL) -> Algorithm:
    """The margin to the iterate learns the difference of win rates, arXiv:2404.03715 algorithm 1."""
    check_above_zero(eta=eta)
    return to_iterate(eta, compares.logistic(), kl)


def inpo(*, eta: float = 0.0075, tau: float = 0.0025, kl: KL = NO_KL) -> Algorithm:
    """The margin to reference and iterate together becomes 1 / (2 eta), arXiv:2407.00617."""
    score, uses = scores.between(tau, eta), frozenset({"reference", "iterate"})
    caution = () if eta >= 0.05 else (
        f"algorithm.eta is {eta}: every pair is to differ by {0.5 / eta:.0f} nats, so that gradients are "
        "large and nearly constant; the values of the paper's authors are not confirmed",)
    base = comparing(Preference(score=score, compare=compares.squared(0.5 / eta), uses=uses), kl)
    return replace(base, cautions=caution)


def spac(
    *, beta: float = 0.1, lam: float = 1.0, penalty: Literal["logsigmoid", "linear"] = "logsigmoid",
    kl: KL = NO_KL,
) -> Algorithm:
    """DPO on data to the iterate, whose own samples become less likely than data, arXiv:2406.04274."""
    bounded = penalty == "logsigmoid"
    base = to_iterate(beta, compares.logistic(), kl, against_own(lam) if bounded else pairs)
    linear = {} if bounded else {"weight": lam, "pull": below_data(beta)}
    return replace(changed(base, **linear), scores_samples=False)


def hypo(*, beta: float = 0.1, kl: KL = HYPO_KL) -> Algorithm:
    """DPO on data, and a KL to the reference on the policy's own samples, arXiv:2406.01462."""
    return replace(
        dpo(beta=beta, kl=kl), advantage=own_only(per_sequence(leave_one_out)),
        reduction=own_mean_token_sum, scores_samples=False)


def nash_md(
    *, kl: KL = NASH_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """Policy gradient of P(own sample wins against the mixture) - coef KL, arXiv:2312.00886."""
    return Algorithm(
        advantage=preference_to_go, ratio=token_ratio, surrogate=surrogate.reinforce,
        reduction=sequence_mean_token_sum, kl=kl, mismatch=mismatch, entropy_coef=entropy_coef,
        selection=Selection(own_only=True))


# fmt: on

ONLINE_PREFERENCE: dict[str, Callable[..., Algorithm]] = {
    "xpo": xpo,
    "selm": selm,
    "sppo": sppo,
    "dno": dno,
    "inpo": inpo,
    "spac": spac,
    "hypo": hypo,
    "nash_md": nash_md,
}
