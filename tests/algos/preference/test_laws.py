"""What must hold for every preference method, in float64: gradients, labels, microbatches, metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algos.advantage import nothing
from rlhf.algos.algorithm import KL, Algorithm
from rlhf.algos.preference import compares
from rlhf.algos.preference.compares import Compare
from rlhf.algos.preference.forms import Row, pair_and_single, pairs, singles, stack
from rlhf.algos.preference.losses import Preference, contrast_loss
from rlhf.algos.preference.online_table import ONLINE_PREFERENCE
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.preference.scores import log_odds, log_ratio
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.metrics import merge
from rlhf.types import Counts, LossInputs, Source
from tests.algos.preference.comparing import comparing, group_of

# srpo learns from groups of six, of which test_srpo.py has the laws
METHODS = {
    n: f for n, f in (PREFERENCE | ONLINE_PREFERENCE | TWO_ROLES).items() if f().preference and n != "srpo"
}
every_method = pytest.mark.parametrize("name", METHODS)
COMPARES: dict[str, Compare] = {
    "logistic": compares.logistic(),
    "smoothed": compares.logistic(smoothing=0.2),
    "with a margin": compares.logistic(margin=0.7),
    "robust": compares.robust(0.2),
    "hinge": compares.hinge(1.0),
    "absolute": compares.absolute(),
    "clipped": compares.clipped_logistic(1.5),
    "clipped above": compares.clipped_logistic(1.5, one_sided=True),
    "discopop": compares.discopop(0.05),
    "exo": compares.exo(0.1),
}
MARGINS = torch.tensor([-40.0, -2.0, -0.3, 0.0, 0.4, 1.2, 3.0, 40.0], dtype=torch.float64)


def preference_of(name: str, **settings: Any) -> Preference:
    preference = METHODS[name](**settings).preference
    assert preference is not None
    return preference


def random_batch(preference: Preference, seed: int) -> LossInputs:
    """Three groups of 2, 3 and 2 completions of several tokens: hard and soft labels, singles where taken.

    Each group has one more completion, which a frozen model has sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [[Comparison(1, 0)], [Comparison(0, 2, 0.8), Comparison(1, 2, 0.55)], [Comparison(1, 0, 0.7)]]
    if preference.form.takes_singles:
        groups[2] = [Comparison(0, None, 1.0), Comparison(1, None, 0.3)]
    sizes, rows, pull = [3, 4, 3], list[Row](), list[float]()
    samplers = [Source.REFERENCE, Source.ITERATE, Source.ITERATE]
    lengths = torch.randint(1, 5, (10,), generator=generator).tolist()
    first = 0
    for size, comparisons, sampler in zip(sizes, groups, samplers, strict=True):
        sources = [Source.DATA] * (size - 1) + [sampler]
        group = group_of(comparisons, lengths[first : first + size], sources)
        rows += [row.shifted(first) for row in preference.rows(group)]
        pull += preference.pulls(group)
        first += size
    batch = comparing([0.0] * 10, rows, lengths=lengths, pull=pull)
    n = len(batch.sequence)
    logprobs = -torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 0.05
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, generator=generator) < 0.8
    # a completion always has a token that counts
    mask[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    contrasts = batch.contrasts
    assert contrasts is not None
    offset = 0.1 * torch.randn(len(rows), generator=generator)
    return replace(
        batch,
        logprobs=logprobs.requires_grad_(),
        ref_logprobs=logprobs.detach() + 0.3 * noise,
        iterate_logprobs=logprobs.detach() - 0.2 * noise.flip(0),
        loss_mask=mask,
        contrasts=replace(contrasts, offset=offset),
    )


def gradient(algorithm: Algorithm, batch: LossInputs) -> Tensor:
    return torch.autograd.grad(algorithm.loss(batch).loss, batch.logprobs)[0]


@every_method
def test_the_gradient_is_that_of_finite_differences(name: str):
    algorithm = METHODS[name]()
    batch = random_batch(preference_of(name), seed=1)

    def loss(logprobs: Tensor) -> Tensor:
        return algorithm.loss(replace(batch, logprobs=logprobs)).loss

    assert torch.autograd.gradcheck(loss, (batch.logprobs,), eps=1e-6, atol=1e-7, rtol=1e-6)
    assert (gradient(algorithm, batch) != 0).any()


@every_method
def test_splitting_the_contrasts_over_microbatches_changes_nothing(name: str):
    algorithm = METHODS[name]()
    batch = random_batch(preference_of(name), seed=2)
    whole = algorithm.loss(batch)
    # the groups are sequences 0 to 2, 3 to 6 and 7 to 9
    parts = [part_of(batch, [7, 8, 9]), part_of(batch, [3, 4, 5, 6, 0, 1, 2])]
    split = [algorithm.loss(part) for part in parts]
    assert sum(o.loss.item() for o in split) == pytest.approx(whole.loss.item(), abs=1e-12)
    got = torch.autograd.grad(split[0].loss + split[1].loss, batch.logprobs)[0]
    torch.testing.assert_close(got, gradient(algorithm, batch), atol=1e-10, rtol=0)
    merged = merge(o.metrics for o in split)
    assert merged.keys() == whole.metrics.keys()
    for key, value in whole.metrics.items():
        assert merged[key].value == pytest.approx(value.value, abs=1e-10), key


def part_of(batch: LossInputs, sequences: list[int]) -> LossInputs:
    """The microbatch of these sequences, in this order."""
    tokens = torch.cat([(batch.sequence == s).nonzero()[:, 0] for s in sequences])
    sizes = torch.tensor([int((batch.sequence == s).sum()) for s in sequences])
    assert batch.contrasts is not None and batch.ref_logprobs is not None and batch.recorded is not None
    per_token = ("logprobs", "entropy", "old_logprobs", "rollout_logprobs", "advantages", "loss_mask", "turn")
    frozen = ("ref_logprobs", "iterate_logprobs")
    return replace(
        batch,
        **{key: getattr(batch, key)[tokens] for key in (*per_token, *frozen, "recorded")},
        sequence=torch.arange(len(sequences)).repeat_interleave(sizes),
        contrasts=batch.contrasts.within(torch.tensor(sequences)),
        pull=None if batch.pull is None else batch.pull[torch.tensor(sequences)],
    )


@pytest.mark.parametrize("name", ["dpo", "dpop", "rpo", "chi_po", "bco", "discopop", "robust_dpo", "nca"])
def test_where_policy_and_reference_agree_margins_are_0(name: str):
    preference = replace(preference_of(name), pull=None)
    batch = random_batch(preference, seed=3)
    contrasts = batch.contrasts
    assert contrasts is not None
    hard = replace(
        contrasts, offset=torch.zeros_like(contrasts.offset), target=torch.ones_like(contrasts.target)
    )
    batch = replace(batch, ref_logprobs=batch.logprobs.detach(), pull=None, contrasts=hard)
    loss, metrics = contrast_loss(batch, preference)
    assert metrics["pairs/margin"].value == 0.0
    assert metrics["pairs/accuracy"].value == 0.5
    assert metrics["pairs/chosen_logratio"].value == 0.0
    at_zero = {"discopop": (math.log(2) + 1) / 2, "nca": 1.5 * math.log(2)}.get(name, math.log(2))
    total = at_zero * hard.weight.sum().item() / hard.share.sum().item()
    assert loss.item() == pytest.approx(total, abs=1e-7)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", COMPARES)
def test_a_soft_label_is_the_mean_over_the_two_hard_ones(name: str, p: float):
    compare = COMPARES[name]
    certain = torch.ones_like(MARGINS)
    expected = p * compare(MARGINS, certain) + (1 - p) * compare(-MARGINS, certain)
    torch.testing.assert_close(compare(MARGINS, p * certain), expected, atol=1e-10, rtol=0)
    assert expected.isfinite().all()


def test_a_soft_label_of_the_squared_loss_is_the_mean_but_for_a_constant():
    # p (z - t)^2 + (1 - p) (z + t)^2 = (z - (2p - 1) t)^2 + 4 p (1 - p) t^2; p .7, t 1/2, z .5: .09 + .21
    compare, ones = compares.squared(0.5), torch.ones_like(MARGINS)
    mean = 0.7 * compare(MARGINS, ones) + 0.3 * compare(-MARGINS, ones)
    torch.testing.assert_close(compare(MARGINS, 0.7 * ones) + 4 * 0.7 * 0.3 * 0.25, mean)
    z = torch.tensor([0.5], dtype=torch.float64)
    assert compare(z, torch.tensor([0.7])).item() == pytest.approx(0.09)
    # p 1/2 draws the margin to 0
    assert compare(z, torch.tensor([0.5])).item() == pytest.approx(0.25)


@pytest.mark.parametrize("compare", [compares.nca(), compares.absolute(good=2.0, bad=0.5)])
def test_a_soft_single_label_is_the_mean_of_good_and_bad(compare: Compare):
    ones = torch.ones_like(MARGINS)
    mean = 0.3 * compare(MARGINS, ones) + 0.7 * compare(MARGINS, 0 * ones)
    torch.testing.assert_close(compare(MARGINS, 0.3 * ones), mean, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "apo_zero", "kto", "exo", "apo_down", "hinge"])
def test_turning_a_comparison_around_with_the_other_probability_changes_nothing(name: str):
    preference = preference_of("slic", nll_coef=0.0) if name == "hinge" else preference_of(name)

    def loss(comparison: Comparison) -> float:
        batch = comparing([-1.0, -3.0], preference.rows(group_of([comparison])))
        return contrast_loss(batch, preference)[0].item()

    assert loss(Comparison(0, 1, 0.8)) == pytest.approx(loss(Comparison(1, 0, 0.2)), rel=1e-6)
    assert loss(Comparison(0, 1, 0.8)) != pytest.approx(loss(Comparison(1, 0, 0.8)), abs=1e-3)


def test_adding_to_both_log_ratios_changes_dpo_in_nothing_but_chi_po():
    def loss(name: str, shift: float) -> float:
        preference = preference_of(name)
        rows = preference.rows(group_of([Comparison(0, 1)]))
        return contrast_loss(comparing([0.5 + shift, -0.5 + shift], rows), preference)[0].item()

    assert loss("dpo", 1.0) == pytest.approx(loss("dpo", 0.0), abs=1e-12)
    assert loss("chi_po", 1.0) < loss("chi_po", 0.0) - 0.01


def test_the_gradient_of_conservative_dpo_turns_where_the_label_is_as_sure_as_the_smoothing():
    # ln(.9 / .1) / .1 = 21.972
    def slope(margin: float) -> float:
        z = torch.tensor([0.1 * margin], dtype=torch.float64, requires_grad=True)
        loss = compares.logistic(smoothing=0.1)(z, torch.ones(1, dtype=torch.float64))
        return torch.autograd.grad(loss.sum(), z)[0].item()

    assert slope(21.97) < 0 < slope(21.98)


def test_a_pair_beyond_the_bound_of_chi_po_has_no_gradient_unless_it_is_wrong_and_one_sided():
    def slopes(**settings: Any) -> list[float]:
        preference = preference_of("chi_po", beta=0.1, **settings)
        # .1 (3 + e^3) = 2.3 for the first: right, wrong; within the bound
        rows = preference.rows(group_of([Comparison(0, 1), Comparison(1, 0), Comparison(2, 1)]))
        batch = comparing(torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64).requires_grad_(), rows)
        loss, metrics = contrast_loss(batch, preference)
        assert metrics["pairs/clipped"].value == pytest.approx(2 / 3)
        assert metrics["pairs/clipped_wrong"].value == pytest.approx(1 / 3)
        return torch.autograd.grad(loss, batch.logprobs)[0].tolist()

    both = slopes()
    assert both[0] == 0.0
    assert both[2] < 0
    assert slopes(one_sided=True)[0] > 0


def test_the_two_sides_of_a_pair_are_singles_with_half_a_share_each():
    assert singles()(Comparison(2, 0, 0.75)) == (
        Row(((2, 1.0),), 0.75, weight=1.0, share=0.5),
        Row(((0, 1.0),), 0.25, weight=1.0, share=0.5),
    )
    assert [r.weight for r in singles(0.5)(Comparison(2, 0))] == [0.5, 0.5]
    assert singles(0.5)(Comparison(1, None, 0.0)) == (Row(((1, 1.0),), 0.0),)


def test_the_extra_row_of_a_pair_has_no_share():
    pair, down = pair_and_single(Comparison(2, 0))
    assert (pair, down) == (Row(((2, 1.0), (0, -1.0)), 1.0), Row(((2, 1.0),), 0.0, weight=1.0, share=0.0))
    assert [r.weight for r in pair_and_single(Comparison(2, 0, 0.75))] == [1.0, 0.75, 0.25]


@pytest.mark.parametrize("form", [pairs, pair_and_single])
def test_a_form_of_pairs_refuses_a_single_label(form: Any):
    assert not form.takes_singles
    with pytest.raises(ValueError, match="take kto, bco, nca or apo_zero"):
        form(Comparison(0, None))


def test_the_methods_that_take_single_labels_are_those_that_the_error_names():
    takes_singles = {n for n in METHODS if preference_of(n).form.takes_singles}
    assert takes_singles == {"kto", "bco", "nca", "apo_zero", "sppo"}


def test_a_single_label_counts_as_one_comparison():
    # 1 - sigmoid(.2), sigmoid(-.5), and the mean of both is that of the pair
    preference = preference_of("kto")
    rows = preference.rows(group_of([Comparison(0, None, 1.0), Comparison(1, None, 0.0)]))
    assert contrast_loss(comparing([2.0, -5.0], rows), preference)[0].item() == pytest.approx(
        0.413853, abs=1e-6
    )


def test_the_baseline_is_taken_from_margins():
    # beta (D - z0) with z0 1: 1 - sigmoid(.1), sigmoid(-.6)
    preference = preference_of("kto")
    assert (preference.baseline, preference.baseline_scale) == ("other_prompts", 0.1)
    batch = comparing([2.0, -5.0], preference.rows(group_of([Comparison(0, 1)])), offset=[0.1, 0.1])
    expected = (1 - 1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(0.6))) / 2
    assert contrast_loss(batch, preference)[0].item() == pytest.approx(expected, abs=1e-7)


def test_the_metrics_of_a_pair_and_a_tie():
    preference = preference_of("rpo")
    comparisons = [Comparison(0, 1), Comparison(2, 3), Comparison(4, 5)]
    lengths = [2, 4, 1, 1, 1, 1]
    group = group_of(comparisons, lengths)
    batch = comparing(
        [-4.0, -6.0, -3.0, -1.0, -1.0, -1.0],
        preference.rows(group),
        reference=[-5.0, -4.0, -1.0, -1.0, -1.0, -1.0],
        lengths=lengths,
        pull=preference.pulls(group),
    )
    loss, metrics = contrast_loss(batch, preference)
    got = {name: value.value for name, value in metrics.items()}
    # D is 1 -2, -2 0 and 0 0: margins .3, -.2, 0
    terms = [math.log1p(math.exp(-z)) for z in (0.3, -0.2, 0.0)]
    slopes = [1 / (1 + math.exp(z)) for z in (0.3, -0.2, 0.0)]
    # NLL a token 2, 3, 1
    assert got == pytest.approx(
        {
            "pairs/loss": sum(terms) / 3,
            "pairs/accuracy": 1.5 / 3,
            "pairs/margin": 0.1 / 3,
            "pairs/weight": sum(slopes) / 3,
            "pairs/pull": 6 / 3,
            "pairs/chosen_logratio": -1 / 3,
            "pairs/rejected_logratio": -2 / 3,
            "pairs/chosen_logprob": -8 / 4,
            "pairs/rejected_logprob": -8 / 6,
            "pairs/chosen_tokens": 4 / 3,
            "pairs/rejected_tokens": 2.0,
        }
    )
    assert loss.item() == pytest.approx(got["pairs/loss"] + got["pairs/pull"])


def test_the_metrics_of_singles_take_the_side_of_the_label_and_skip_what_has_no_share():
    kto, down = preference_of("kto"), preference_of("apo_down")
    _, metrics = contrast_loss(comparing([2.0, -5.0], kto.rows(group_of([Comparison(0, 1)]))), kto)
    assert metrics["pairs/chosen_logratio"].value == 2.0
    assert metrics["pairs/rejected_logratio"].value == -5.0
    # .2 on the good side, .5 on the bad one
    assert metrics["pairs/margin"].value == pytest.approx(0.35)
    assert metrics["pairs/accuracy"].value == 1.0
    _, metrics = contrast_loss(comparing([2.0, -5.0], down.rows(group_of([Comparison(0, 1)]))), down)
    assert metrics["pairs/margin"].value == pytest.approx(0.7)
    assert metrics["pairs/loss"].value == pytest.approx(0.881646, abs=1e-6)
    assert metrics["pairs/rejected_tokens"].value == 1.0


def test_without_a_reference_there_are_no_log_ratios():
    simpo = preference_of("simpo")
    _, metrics = contrast_loss(comparing([-0.5, -0.8], simpo.rows(group_of([Comparison(0, 1)]))), simpo)
    assert "pairs/chosen_logratio" not in metrics
    assert "pairs/pull" not in metrics
    assert not PREFERENCE["simpo"]().needs_reference
    assert PREFERENCE["dpo"]().needs_reference


def test_a_microbatch_without_comparisons_adds_nothing():
    batch = replace(comparing(torch.zeros(2).requires_grad_(), []), counts=Counts(2, 2, comparisons=4.0))
    output = PREFERENCE["dpo"]().loss(batch)
    assert output.loss.item() == 0.0
    assert (torch.autograd.grad(output.loss, batch.logprobs)[0] == 0).all()
    assert not any(name.startswith("pairs/") for name in output.metrics)


def test_a_method_on_comparisons_has_no_loss_of_tokens():
    algorithm = PREFERENCE["dpo"](kl=KL(coef=0.1))
    assert algorithm.advantage is nothing
    assert algorithm.preference is not None
    batch = comparing([-4.0, -6.0], algorithm.preference.rows(group_of([Comparison(0, 1)])))
    metrics = algorithm.loss(batch).metrics
    assert {"entropy", "perplexity", "pairs/loss"} <= metrics.keys()
    assert {"loss/policy", "ratio/mean", "ratio/max", "kl/old", "kl/ref", "mismatch/k3"}.isdisjoint(metrics)
    # k3 of two samples of the policy: e^4 - 1 - 4 and e^6 - 1 - 6, both kept at 10
    sampled = algorithm.loss(replace(batch, recorded=None)).metrics
    assert sampled["kl/ref"].value == 10.0
    # k3 with the coefficient, a mean over tokens, is added to the loss
    plain, with_kl = (algorithm.loss(replace(batch, kl_coef=coef)).loss.item() for coef in (0.0, 0.1))
    assert with_kl == pytest.approx(plain + 1.0)


def test_log_probs_are_added_up_in_fp32():
    # bf16 would give 256 for the sum of 300 ones
    preference = replace(preference_of("ipo", per_token=False), score=log_ratio(1.0))
    batch = comparing([-300.0, 0.0], preference.rows(group_of([Comparison(0, 1)])), lengths=[300, 1])
    assert batch.ref_logprobs is not None
    small = replace(batch, logprobs=batch.logprobs.bfloat16(), ref_logprobs=batch.ref_logprobs.bfloat16())
    loss, metrics = contrast_loss(small, preference)
    assert metrics["pairs/margin"].value == -300.0
    assert loss.dtype is torch.float32


def test_the_odds_of_a_certain_completion_are_finite():
    preference = Preference(score=log_odds(), compare=compares.logistic())
    batch = comparing(torch.zeros(2, dtype=torch.float64).requires_grad_(), pairs(Comparison(0, 1)))
    loss, _ = contrast_loss(batch, preference)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, batch.logprobs)[0].isfinite().all()


@pytest.mark.parametrize("make", [PREFERENCE["dpo"], PREFERENCE["robust_dpo"], PREFERENCE["exo"]])
def test_half_of_all_labels_wrong_or_more_is_refused(make: Any):
    with pytest.raises(ValueError, match=r"label_smoothing must be .* got 0\.5"):
        make(label_smoothing=0.5)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("dpo", "beta", 0.0),
        ("simpo", "beta", -1.0),
        ("dpop", "beta", 0.0),
        ("ipo", "tau", 0.0),
        ("chi_po", "beta", 0.0),
        ("chi_po", "max_reward", 0.0),
        ("discopop", "tau", 2.0),
        ("sppo", "beta", 0.0),
        ("inpo", "eta", 0.0),
        ("dno", "eta", -1.0),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(name: str, setting: str, value: float):
    with pytest.raises(ValueError, match=rf"^{setting} must be above 0.* got {value}"):
        METHODS[name](**{setting: value})


def test_rows_become_tensors():
    contrasts = stack([Row(((0, 1.0), (1, -1.0)), 1.0), Row(((1, 1.0),), 0.3, 0.5, 0.25).shifted(2)])
    assert contrasts.sequence.tolist() == [0, 1, 3]
    assert contrasts.coefficient.tolist() == [1.0, -1.0, 1.0]
    assert contrasts.contrast.tolist() == [0, 0, 1]
    assert contrasts.target.tolist() == pytest.approx([1.0, 0.3])
    assert contrasts.weight.tolist() == [1.0, 0.5]
    assert contrasts.share.tolist() == [1.0, 0.25]
    assert contrasts.offset.tolist() == [0.0, 0.0]
