"""The preference methods by name: DPO and its relatives, as values of `Preference`.

A default is the paper's value, or else that of the authors' code or of TRL. docs/preferences.md has the
formulas. Differences from papers and peers: 1. methods on singles (`bco`, `nca`, `apo_zero`) add the losses
of the two sides of a pair, as TRL's DPOTrainer does; `kto` takes their mean, as TRL's KTOTrainer does;
2. `ipo` divides by the tokens unless `per_token` is off, as TRL does, which says that the authors confirmed
it; the paper has sums, and `tau` does not carry over between the two; 3. the negative log-likelihood of
`cpo`, `orpo` and `rpo` is a mean over the tokens of each completion, then over pairs; the codes of CPO and
ORPO take one mean over the tokens of a whole microbatch, and ORPO's counts the prompt too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rlhf.algos import surrogate
from rlhf.algos.advantage import nothing
from rlhf.algos.algorithm import KL, NO_KL, Algorithm, FromData, Mismatch
from rlhf.algos.preference import compares, scores
from rlhf.algos.preference.checks import check_above_zero
from rlhf.algos.preference.compares import Compare
from rlhf.algos.preference.forms import Form, pair_and_single, pairs, singles
from rlhf.algos.preference.losses import Preference, toward_better
from rlhf.algos.preference.scores import Score, log_prob, log_ratio
from rlhf.algos.ratio import token_ratio
from rlhf.algos.reduction import token_mean

REFERENCE = frozenset({"reference"})


def comparing(preference: Preference, kl: KL) -> Algorithm:
    """The algorithm that has this loss and nothing else but a KL."""
    return Algorithm(
        advantage=nothing,
        ratio=token_ratio,
        surrogate=surrogate.reinforce,
        reduction=token_mean,
        preference=preference,
        from_data=FromData(),
        mismatch=Mismatch("none"),
        kl=kl,
    )


def to_reference(score: Score, compare: Compare, kl: KL, form: Form = pairs) -> Algorithm:
    """A method whose score reads the reference."""
    return comparing(Preference(form=form, score=score, compare=compare, uses=REFERENCE), kl)


def changed(algorithm: Algorithm, **changes: object) -> Algorithm:
    """The same with some fields of its preference replaced."""
    assert algorithm.preference is not None
    return replace(algorithm, preference=replace(algorithm.preference, **changes))


# laid out by hand: one algorithm is one short paragraph
# fmt: off


def dpo(
    *, beta: float = 0.1, label_smoothing: float = 0.0, per_token: bool = False, kl: KL = NO_KL,
) -> Algorithm:
    """Direct preference optimization, arXiv:2305.18290; `label_smoothing` is conservative DPO."""
    compare = compares.logistic(smoothing=label_smoothing)
    return to_reference(log_ratio(beta, per_token=per_token), compare, kl)


def robust_dpo(*, beta: float = 0.01, label_smoothing: float = 0.1, kl: KL = NO_KL) -> Algorithm:
    """DPO without the bias of labels of which a known share is wrong, arXiv:2403.00409."""
    return to_reference(log_ratio(beta), compares.robust(label_smoothing), kl)


def ipo(*, tau: float = 0.1, per_token: bool = True, kl: KL = NO_KL) -> Algorithm:
    """The margin is to become 1 / (2 tau), and no more, arXiv:2310.12036."""
    check_above_zero(tau=tau)
    return to_reference(log_ratio(1.0, per_token=per_token), compares.squared(0.5 / tau), kl)


def slic(
    *, delta: float = 1.0, beta: float = 1.0, nll_coef: float = 1.0, use_reference: bool = False,
    kl: KL = NO_KL,
) -> Algorithm:
    """Hinge on log-probs plus NLL, arXiv:2305.10425; with `use_reference` on log-ratios (TRL's hinge)."""
    score = log_ratio(beta) if use_reference else log_prob(beta)
    pull = toward_better(nll_coef, per_token=False) if nll_coef else None
    uses = REFERENCE if use_reference else frozenset[str]()
    return comparing(Preference(score=score, compare=compares.hinge(delta), uses=uses, pull=pull), kl)


def simpo(*, beta: float = 2.0, gamma: float = 1.0, kl: KL = NO_KL) -> Algorithm:
    """Log-probs a token with a margin of `gamma`, without a reference, arXiv:2405.14734."""
    score, compare = log_prob(beta, per_token=True), compares.logistic(margin=gamma)
    return comparing(Preference(score=score, compare=compare), kl)


def cpo(*, beta: float = 0.1, nll_coef: float = 1.0, kl: KL = NO_KL) -> Algorithm:
    """DPO without the reference, plus NLL a token of the better one, arXiv:2401.08417."""
    pull = toward_better(nll_coef, per_token=True) if nll_coef else None
    return comparing(Preference(score=log_prob(beta), compare=compares.logistic(), pull=pull), kl)


def orpo(*, lam: float = 0.1, kl: KL = NO_KL) -> Algorithm:
    """NLL of the better one plus `lam` times the log odds ratio, without a reference, arXiv:2403.07691."""
    odds, nll = scores.log_odds(), toward_better(1.0, per_token=True)
    return comparing(Preference(score=odds, compare=compares.logistic(), weight=lam, pull=nll), kl)


def dpop(*, beta: float = 0.3, lam: float = 50.0, kl: KL = NO_KL) -> Algorithm:
    """DPO that keeps the better one at least as likely as the reference does, arXiv:2402.13228."""
    return to_reference(scores.positive(beta, lam), compares.logistic(), kl)


def rpo(*, beta: float = 0.1, nll_coef: float = 1.0, kl: KL = NO_KL) -> Algorithm:
    """DPO plus NLL a token of the better one, arXiv:2404.19733."""
    return changed(dpo(beta=beta, kl=kl), pull=toward_better(nll_coef, per_token=True))


def chi_po(
    *, beta: float = 0.05, max_reward: float = 1.0, one_sided: bool = False, kl: KL = NO_KL,
) -> Algorithm:
    """DPO with chi-squared beside the KL, arXiv:2407.13399; `one_sided` clips no wrong pair."""
    check_above_zero(max_reward=max_reward)
    bound = 2.0 * max_reward
    base = to_reference(scores.chi(beta), compares.clipped_logistic(bound, one_sided=one_sided), kl)
    return changed(base, bound=bound)


def kto(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, kl: KL = NO_KL,
) -> Algorithm:
    """Each completion against the mean of other prompts' ones, arXiv:2402.01306."""
    base = to_reference(log_ratio(beta), compares.absolute(good=desirable_weight, bad=undesirable_weight), kl,
                        singles(0.5))
    return changed(base, baseline="other_prompts", baseline_scale=beta)


def bco(*, beta: float = 0.01, kl: KL = NO_KL) -> Algorithm:
    """A classifier of good and bad completions, shifted by the running mean reward, arXiv:2404.04656."""
    base = to_reference(log_ratio(beta), compares.logistic(), kl, singles())
    return changed(base, baseline="running_mean", baseline_scale=beta)


def nca(*, beta: float = 0.01, kl: KL = NO_KL) -> Algorithm:
    """Noise contrastive alignment: the better one stays likely, arXiv:2402.05369."""
    return to_reference(log_ratio(beta), compares.nca(), kl, singles())


def apo_zero(*, beta: float = 0.1, kl: KL = NO_KL) -> Algorithm:
    """Makes the better one likelier and the other less likely, each by itself, arXiv:2408.06266."""
    return to_reference(log_ratio(beta), compares.absolute(), kl, singles())


def apo_down(*, beta: float = 0.1, kl: KL = NO_KL) -> Algorithm:
    """Makes both less likely, the other one more: for a policy above its data, arXiv:2408.06266."""
    return to_reference(log_ratio(beta), compares.absolute(), kl, pair_and_single)


def exo(*, beta: float = 0.1, label_smoothing: float = 1e-3, kl: KL = NO_KL) -> Algorithm:
    """The reverse KL of the pair's two probabilities to the smoothed label, arXiv:2402.00856."""
    return to_reference(log_ratio(beta), compares.exo(label_smoothing), kl)


def discopop(*, beta: float = 0.05, tau: float = 0.05, kl: KL = NO_KL) -> Algorithm:
    """A blend of the logistic and the exponential loss, found by a language model, arXiv:2406.08414."""
    return to_reference(log_ratio(beta), compares.discopop(tau), kl)


# fmt: on

PREFERENCE: dict[str, Callable[..., Algorithm]] = {
    "dpo": dpo,
    "robust_dpo": robust_dpo,
    "ipo": ipo,
    "slic": slic,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "dpop": dpop,
    "rpo": rpo,
    "chi_po": chi_po,
    "kto": kto,
    "bco": bco,
    "nca": nca,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "exo": exo,
    "discopop": discopop,
}
