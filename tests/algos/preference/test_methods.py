"""The loss of each preference method on one comparison, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.preference.forms import Row
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.tensors.contrasts import Rival
from tests.algos.preference.comparing import comparing, group_of


def loss_of(
    algorithm: Algorithm,
    logprobs: Sequence[float],
    lengths: Sequence[int] | None = None,
    probability: float = 1.0,
) -> float:
    """Of completion 0 over completion 1; the log-probs are log-ratios, because the reference is 0."""
    preference = algorithm.preference
    assert preference is not None
    comparisons = [Comparison(0, 1, probability)]
    group = group_of(comparisons, lengths or [1] * len(logprobs))
    batch = comparing(logprobs, preference.rows(group), lengths=lengths, pull=preference.pulls(group))
    return algorithm.loss(batch).loss.item()


PAIR = (2.0, -5.0)


@pytest.mark.parametrize(
    ("name", "settings", "logprobs", "expected"),
    [
        # -log sigmoid(.1 * 7)
        ("dpo", {"beta": 0.1}, PAIR, 0.403186),
        # .9 * .403186 + .1 * 1.103186
        ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, PAIR, 0.473186),
        # (.9 * .403186 - .1 * 1.103186) / .8
        ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.1}, PAIR, 0.315686),
        # (7 - 5)^2
        ("ipo", {"tau": 0.1, "per_token": False}, PAIR, 4.0),
        # 1 - .7, TRL's hinge
        ("slic", {"beta": 0.1, "use_reference": True, "nll_coef": 0.0}, PAIR, 0.3),
        # max(1 - (-5 + 5.4), 0) + .5 * 5
        ("slic", {"nll_coef": 0.5}, (-5.0, -5.4), 0.6 + 2.5),
        # -log sigmoid(2 * .3 - 1)
        ("simpo", {}, (-0.5, -0.8), 0.913015),
        # -log sigmoid(.1 * 3), and the NLL
        ("cpo", {"nll_coef": 0.0}, (-5.0, -8.0), 0.554355),
        ("cpo", {}, (-5.0, -8.0), 5.554355),
        # log odds -.5 - log(1 - e^-.5) = .432752 and -.8 - log(1 - e^-.8) = -.203382
        ("orpo", {"lam": 1.0}, (-0.5, -0.8), 0.5 + 0.424833),
        ("orpo", {}, (-0.5, -0.8), 0.5 + 0.1 * 0.424833),
        # -log sigmoid(.1 * (4 - 5 * 1))
        ("dpop", {"beta": 0.1, "lam": 5.0}, (-1.0, -5.0), 0.744397),
        # the better one is above the reference: DPO
        ("dpop", {"beta": 0.1, "lam": 5.0}, PAIR, 0.403186),
        ("rpo", {"nll_coef": 0.5}, (-1.0, -8.0), 0.403186 + 0.5),
        # -log sigmoid(.05 * (2 + e^2 + 5 - e^-5)) = -log sigmoid(.719116)
        ("chi_po", {}, PAIR, 0.396884),
        # 2 .5 = .5 + e^.5 = 2.148721 and -.5 + e^-.5 = .106531
        ("chi_po", {}, (0.5, -0.5), 0.643395),
        ("chi_po", {"beta": 0.1}, PAIR, 0.212970),
        # mean of 1 - sigmoid(.2) = .450166 and sigmoid(-.5) = .377541
        ("kto", {}, PAIR, 0.413853),
        (
            "kto",
            {"desirable_weight": 2.0, "undesirable_weight": 0.5},
            PAIR,
            (2 * 0.450166 + 0.5 * 0.377541) / 2,
        ),
        # -log sigmoid(.2) - log sigmoid(.5) = .598139 + .474077
        ("bco", {"beta": 0.1}, PAIR, 1.072216),
        # .598139 + (.798139 + .474077) / 2
        ("nca", {"beta": 0.1}, PAIR, 1.234247),
        # .450166 + .377541
        ("apo_zero", {}, PAIR, 0.827707),
        # sigmoid(.2) + 1 - sigmoid(.7) = .549834 + .331812
        ("apo_down", {}, PAIR, 0.881646),
        # .668188 (log .668188 - log .9) + .331812 (log .331812 - log .1)
        ("exo", {"label_smoothing": 0.1}, PAIR, 0.198972),
        # sigmoid(.7 / .05) is 1 but for 8e-7: e^-.7
        ("discopop", {"beta": 0.1}, PAIR, 0.496585),
    ],
)
def test_the_loss_is_the_number_worked_out_by_hand(
    name: str, settings: dict[str, float], logprobs: tuple[float, float], expected: float
):
    assert loss_of(PREFERENCE[name](**settings), logprobs) == pytest.approx(expected, abs=2e-6)


def test_discopop_begins_uphill():
    # with l = -log sigmoid(z): m' (e^-z - l) - (1 - m) sigmoid(-z) - m e^-z at z = 0, where m' = 1 / (4 tau)
    slope = (1 - math.log(2)) / (4 * 0.05) - 0.5 * 0.5 - 0.5
    assert slope == pytest.approx(0.784264, abs=1e-6)
    algorithm, step = PREFERENCE["discopop"](beta=1.0), 1e-3
    rise = loss_of(algorithm, (step, 0.0)) - loss_of(algorithm, (-step, 0.0))
    assert rise / (2 * step) == pytest.approx(slope, abs=1e-3)


def chase(own: float, other: float, *, is_fast: bool) -> float:
    """The loss of one of two copies, whose log-ratios of a pair differ by `own` and `other`."""
    algorithm, rows = TWO_ROLES["ofs_dpo"](beta=0.1, alpha=0.1), [Row(((0, 1.0), (1, -1.0)), 1.0)]
    rival = Rival(torch.tensor([0.1 * other], dtype=torch.float64), is_slow=is_fast)
    return algorithm.loss(replace(comparing([own, 0.0], rows), rival=rival)).loss.item()


def test_two_copies_chase_each_other_as_worked_out_by_hand():
    # margins .7 and .4: -log sigmoid(.7) = .403186, -log sigmoid(.4) = .513015, -log sigmoid(.3) = .554355
    assert chase(7.0, 4.0, is_fast=True) == pytest.approx(0.403186 + 0.1 * 0.554355, abs=1e-6)
    assert chase(4.0, 7.0, is_fast=False) == pytest.approx(0.513015 - 0.1 * 0.554355, abs=1e-6)
    # alike: ln 2, with a plus and with a minus
    assert chase(7.0, 7.0, is_fast=True) == pytest.approx(0.403186 + 0.1 * math.log(2), abs=1e-6)
    assert chase(7.0, 7.0, is_fast=False) == pytest.approx(0.403186 - 0.1 * math.log(2), abs=1e-6)


def test_a_lead_of_more_than_ten_counts_as_ten():
    # the slow copy is 20 ahead: log sigmoid(-10) = -10.0000454, and no further gain from leading by more
    assert chase(300.0, 100.0, is_fast=False) == pytest.approx(-0.1 * 10.0000454, abs=1e-6)
    assert chase(400.0, 100.0, is_fast=False) == pytest.approx(-0.1 * 10.0000454, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"lr_ratio": 0.0}, {"lr_ratio": 1.5}, {"interval": 0}])
def test_settings_of_the_chase_that_make_no_sense_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TWO_ROLES["ofs_dpo"](**wrong)


def test_per_token_scores_divide_each_completion_by_its_own_tokens():
    # 2 / 10 + 5 / 20 = .45, (.45 - 5)^2
    assert loss_of(PREFERENCE["ipo"](), PAIR, (10, 20)) == pytest.approx(20.7025)
    assert loss_of(PREFERENCE["dpo"](per_token=True), PAIR, (10, 20)) == pytest.approx(
        math.log1p(math.exp(-0.045))
    )
    assert loss_of(PREFERENCE["simpo"](), (-5.0, -16.0), (10, 20)) == pytest.approx(0.913015, abs=2e-6)
    # NLL 6 over 3 tokens
    assert loss_of(PREFERENCE["rpo"](), (-6.0, -13.0), (3, 5)) == pytest.approx(0.403186 + 2.0, abs=2e-6)
