"""Methods with samples of a frozen model, worked out by hand on groups of a few completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf.algos.algorithm import KL, Algorithm
from rlhf.algos.preference.forms import against_own
from rlhf.algos.preference.losses import contrast_loss
from rlhf.algos.preference.online_table import ONLINE_PREFERENCE
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.preference.table import PREFERENCE
from rlhf.types import AdvantageInputs, LossInputs, Source
from tests.algos.preference.comparing import comparing, group_of

POLICY, REFERENCE, ITERATE, DATA = Source.POLICY, Source.REFERENCE, Source.ITERATE, Source.DATA


def batch_of(
    algorithm: Algorithm,
    logprobs: Sequence[float],
    sources: Sequence[Source],
    comparisons: Sequence[Comparison] = (Comparison(0, 1),),
    **frozen: Any,
) -> LossInputs:
    preference = algorithm.preference
    assert preference is not None
    group = group_of(comparisons, [1] * len(logprobs), sources)
    given = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    return comparing(given, preference.rows(group), pull=preference.pulls(group), **frozen)


def loss_of(algorithm: Algorithm, *args: Any, **frozen: Any) -> float:
    return algorithm.loss(batch_of(algorithm, *args, **frozen)).loss.item()


def gradient_of(algorithm: Algorithm, *args: Any, **frozen: Any) -> list[float]:
    batch = batch_of(algorithm, *args, **frozen)
    return torch.autograd.grad(algorithm.loss(batch).loss, batch.logprobs)[0].tolist()


def test_xpo_makes_what_the_reference_sampled_less_likely():
    # -log sigmoid(.1 * 7) = .403186, and 1e-5 * -120
    xpo, args = ONLINE_PREFERENCE["xpo"](), ([-113.0, -120.0], [POLICY, REFERENCE])
    assert loss_of(xpo, *args, reference=[-115.0, -115.0]) == pytest.approx(0.401986, abs=1e-6)
    dpo = PREFERENCE["dpo"]()
    better, worse = (
        a - b
        for a, b in zip(
            gradient_of(xpo, *args, reference=[-115.0, -115.0]),
            gradient_of(dpo, *args, reference=[-115.0, -115.0]),
            strict=True,
        )
    )
    assert (better, worse) == pytest.approx((0.0, 1e-5))
    # also where the reference's sample is the better one
    chosen = ([-113.0, -120.0], [REFERENCE, POLICY])
    assert gradient_of(xpo, *chosen)[0] - gradient_of(dpo, *chosen)[0] == pytest.approx(1e-5)


def test_xpo_has_no_gradient_where_the_pull_balances_the_pair():
    # a better sample of the reference: beta sigmoid(-beta h) = alpha at h = log(beta / alpha - 1) / beta
    h = math.log(0.1 / 1e-5 - 1.0) / 0.1
    assert h == pytest.approx(92.10, abs=0.01)
    assert gradient_of(ONLINE_PREFERENCE["xpo"](), [h, 0.0], [REFERENCE, POLICY])[0] == pytest.approx(
        0.0, abs=1e-9
    )


def test_selm_pulls_the_sample_of_the_iterate_by_alpha_beta():
    # -log sigmoid(.01 * 7) = .6587596, and .001 * .01 * 1.5: the sample is in no pair
    selm = ONLINE_PREFERENCE["selm"]()
    assert loss_of(selm, [2.0, -5.0, 1.5], [DATA, DATA, ITERATE]) == pytest.approx(0.6587746, abs=1e-7)
    assert gradient_of(selm, [2.0, -5.0, 1.5], [DATA, DATA, ITERATE])[2] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["xpo", "selm"])
def test_without_a_pull_they_are_dpo_bit_for_bit(name: str):
    args = ([2.0, -5.0, 1.5], [ITERATE, REFERENCE, DATA])
    plain = ONLINE_PREFERENCE[name](alpha=0.0, beta=0.1)
    assert loss_of(plain, *args) == loss_of(PREFERENCE["dpo"](), *args)
    assert gradient_of(plain, *args) == gradient_of(PREFERENCE["dpo"](), *args)


def test_several_samples_of_a_model_share_the_pull_of_a_comparison():
    # two comparisons, two samples: each has the weight 2 / 2 of a comparison, then the mean over 2
    preference = ONLINE_PREFERENCE["xpo"](alpha=0.5).preference
    assert preference is not None
    sources = [POLICY, REFERENCE, REFERENCE]
    assert preference.pulls(group_of([Comparison(0, 1), Comparison(0, 2)], [1] * 3, sources)) == [
        0.0,
        0.5,
        0.5,
    ]
    assert preference.pulls(group_of([Comparison(0, 1)], [1] * 3, sources)) == [0.0, 0.25, 0.25]


def test_sppo_takes_each_side_to_its_win_rate():
    # (2 - 5)^2 + (-5 + 5)^2, with 1 / (2 beta) = 5
    sppo = ONLINE_PREFERENCE["sppo"]()
    assert loss_of(sppo, [2.0, -5.0], [POLICY, POLICY]) == pytest.approx(9.0)
    # P .75: targets 2.5 and -2.5
    soft = [Comparison(0, 1, 0.75)]
    assert loss_of(sppo, [2.0, -5.0], [POLICY, POLICY], soft) == pytest.approx(0.25 + 6.25)


def test_dno_learns_the_difference_of_win_rates():
    # sigmoid(.8 - .3) = .622459; -p log sigmoid(.4) - (1 - p) log sigmoid(-.4)
    dno, soft = ONLINE_PREFERENCE["dno"](eta=0.1), [Comparison(0, 1, 1 / (1 + math.exp(-0.5)))]
    own = [POLICY, POLICY]
    assert loss_of(dno, [3.0, -1.0], own, soft) == pytest.approx(0.664032, abs=1e-6)
    assert loss_of(dno, [4.0, -1.0], own, soft) == pytest.approx(0.662847, abs=1e-6)
    assert gradient_of(dno, [4.0, -1.0], own, soft) == pytest.approx([0.0, 0.0], abs=1e-7)


def test_inpo_measures_from_reference_and_iterate_together():
    # 10 - 4 / 3 - 2 * 7 / 3 = 4; (4 - 1 / .015)^2
    inpo, own = ONLINE_PREFERENCE["inpo"](), [POLICY, POLICY]
    got = loss_of(inpo, [10.0, 0.0], own, reference=[4.0, 0.0], iterate=[7.0, 0.0])
    assert got == pytest.approx(3927.111, abs=1e-3)
    # tau = eta: IPO to the reference with the target 1 / (2 tau); iterate = reference: with 1 / (2 eta)
    ipo = PREFERENCE["ipo"](tau=0.2, per_token=False)
    for tau, iterate in [(0.2, [7.0, 1.0]), (0.1, [4.0, 0.0])]:
        same = ONLINE_PREFERENCE["inpo"](eta=0.2, tau=tau)
        args = ([3.0, 0.5], own)
        assert loss_of(same, *args, reference=[4.0, 0.0], iterate=iterate) == pytest.approx(
            loss_of(ipo, *args, reference=[4.0, 0.0])
        )
    with pytest.raises(ValueError, match="tau must be at most eta"):
        ONLINE_PREFERENCE["inpo"](eta=0.1, tau=0.2)


def test_inpo_warns_of_a_target_of_many_nats():
    assert "67 nats" in ONLINE_PREFERENCE["inpo"]().cautions[0]
    assert not ONLINE_PREFERENCE["inpo"](eta=0.5, tau=0.1).cautions


GAME = ([2.0, -5.0, -1.0], [DATA, DATA, ITERATE])


def test_spac_lowers_its_own_sample_below_the_mean_of_the_data():
    # 2 * .403186 + log(1 + e^(.1 (-1 + 1.5)))
    spac = ONLINE_PREFERENCE["spac"](lam=2.0)
    assert loss_of(spac, *GAME) == pytest.approx(1.524832, abs=1e-6)
    # where policy and iterate agree: lam ln 2 and ln 2
    assert loss_of(spac, [0.0] * 3, GAME[1]) == pytest.approx(3 * math.log(2))
    # the sample counts as no comparison
    preference = spac.preference
    assert preference is not None
    _, metrics = contrast_loss(batch_of(spac, *GAME), preference)
    assert metrics["pairs/margin"].value == pytest.approx(0.7)


def test_the_linear_penalty_of_spac_pulls_by_beta_and_by_half_of_it_on_each_side():
    spac, bounded = (ONLINE_PREFERENCE["spac"](lam=2.0, penalty=p) for p in ("linear", "logsigmoid"))
    # 2 * .403186 + .1 * (-1 - (2 - 5) / 2)
    assert loss_of(spac, *GAME) == pytest.approx(0.856372, abs=1e-6)
    pair = [2.0 * x for x in gradient_of(PREFERENCE["dpo"](), *GAME)]
    got = [a - b for a, b in zip(gradient_of(spac, *GAME), pair, strict=True)]
    assert got == pytest.approx([-0.05, -0.05, 0.1])
    # half the slope where policy and iterate agree: sigmoid(0)
    at_zero = ([0.0] * 3, GAME[1])
    pair = [2.0 * x for x in gradient_of(PREFERENCE["dpo"](), *at_zero)]
    got = [a - b for a, b in zip(gradient_of(bounded, *at_zero), pair, strict=True)]
    assert got == pytest.approx([-0.025, -0.025, 0.05])


def test_without_samples_spac_is_dpo_to_the_iterate():
    rows = against_own(2.0)(Comparison(0, 1), [DATA, DATA])
    assert [(r.entries, r.weight, r.share) for r in rows] == [(((0, 1.0), (1, -1.0)), 2.0, 1.0)]


def test_what_the_loss_depends_on_is_kept_of_a_group():
    def learned(name: str, sources: Sequence[Source]) -> set[int]:
        preference = (PREFERENCE | ONLINE_PREFERENCE)[name]().preference
        assert preference is not None
        return preference.learned(group_of([Comparison(3, 1)], [1] * 4, sources))

    sources = [ITERATE, DATA, REFERENCE, DATA]
    assert learned("dpo", sources) == {1, 3}
    assert learned("selm", sources) == {0, 1, 3}
    assert learned("xpo", sources) == {1, 2, 3}
    assert learned("spac", sources) == {0, 1, 2, 3}


def test_hypo_holds_own_samples_to_the_reference_and_data_by_pairs():
    hypo = ONLINE_PREFERENCE["hypo"]()
    # two own samples with sums of log-ratios 1 and 3, and a pair of data: coef 1e-3 * (-+2), in the other way
    inputs = AdvantageInputs(
        rewards=torch.zeros(4, dtype=torch.float64),
        objectives=torch.zeros(4, 1),
        objective_weights=torch.ones(1),
        group=torch.zeros(4, dtype=torch.int64),
        token_penalty=1e-3 * torch.tensor([1.0, 2.0, 1.0, 9.0, 9.0], dtype=torch.float64),
        sequence=torch.tensor([0, 1, 1, 2, 3]),
        loss_mask=torch.ones(5, dtype=torch.bool),
        turn=torch.zeros(5, dtype=torch.int64),
        own=torch.tensor([True, True, False, False]),
    )
    assert hypo.advantage(inputs).tolist() == pytest.approx([2e-3, -2e-3, -2e-3, 0.0, 0.0])
    assert not hypo.needs_rewards and not hypo.has_teacher
    # without samples it is DPO
    assert loss_of(hypo, [2.0, -5.0], [DATA, DATA]) == pytest.approx(0.403186, abs=1e-6)
    # where policy and reference agree there is no gradient of the KL
    at_start = replace(inputs, token_penalty=torch.zeros(5, dtype=torch.float64))
    assert hypo.advantage(at_start).tolist() == [0.0] * 5


def test_nash_md_takes_the_penalties_of_all_later_tokens():
    # the expectation over the four completions of two tokens is the gradient of the KL; each token's own
    # penalty alone, as in TRL, would turn the sign of the first token's
    logits = torch.tensor([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.8]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.8, 0.2]], dtype=torch.float64).log()
    tables = logits.log_softmax(1)
    nash = ONLINE_PREFERENCE["nash_md"](kl=KL(coef=1.0, estimator="k1", placement="reward"))
    total = torch.zeros((), dtype=torch.float64)
    for first, second in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        logp = torch.stack([tables[0, first], tables[1 + first, second]])
        ref = torch.stack([reference[0, first], reference[1 + first, second]])
        penalty = nash.token_penalty(logp.detach(), ref, 1.0)
        inputs = AdvantageInputs(
            rewards=torch.tensor([0.5], dtype=torch.float64),
            objectives=torch.zeros(1, 1),
            objective_weights=torch.ones(1),
            group=torch.zeros(1, dtype=torch.int64),
            token_penalty=penalty,
            sequence=torch.zeros(2, dtype=torch.int64),
            loss_mask=torch.ones(2, dtype=torch.bool),
            turn=torch.zeros(2, dtype=torch.int64),
        )
        total = total - logp.detach().sum().exp() * (nash.advantage(inputs) * logp).sum()
    gradient = torch.autograd.grad(total, logits)[0].flatten().tolist()
    assert gradient == pytest.approx([-0.10870, 0.10870, 0.18654, -0.18654, -0.17370, 0.17370], abs=1e-5)
