"""A-LoL, its relatives and AWR as values of the table: the papers' formulas in numbers, and their laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.critic import CriticLoss
from rlhf.algos.imitation import IMITATION
from rlhf.algos.prompt_temperature import PromptTemperature, factor_of
from rlhf.algos.weighted import a_lol, awr
from rlhf.types import AdvantageInputs, Counts, LossInputs

A_LOL = ("a_lol", "a_lol_seq", "a_lol_ref_free")
LOGPROBS, REFERENCE = (-1.0, -2.0, -3.0), (-0.8, -2.5, -2.2)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def scores(rewards: Tensor, group: list[int], values: Tensor | None = None) -> AdvantageInputs:
    """One token a sequence."""
    n = len(rewards)
    return AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=torch.ones(1),
        group=torch.tensor(group),
        token_penalty=torch.zeros(n, dtype=rewards.dtype),
        sequence=torch.arange(n),
        loss_mask=torch.ones(n, dtype=torch.bool),
        turn=torch.zeros(n, dtype=torch.long),
        prompt_values=values,
    )


def one_completion(advantage: Tensor, logprobs: Tensor, reference: Tensor) -> LossInputs:
    n = len(logprobs)
    return LossInputs(
        logprobs=logprobs,
        entropy=torch.zeros_like(reference),
        exact_kl=None,
        old_logprobs=logprobs.detach(),
        rollout_logprobs=torch.zeros_like(reference),
        ref_logprobs=reference,
        advantages=advantage.expand(n),
        loss_mask=torch.ones(n, dtype=torch.bool),
        sequence=torch.zeros(n, dtype=torch.long),
        turn=torch.zeros(n, dtype=torch.long),
        counts=Counts(tokens=n, sequences=1),
        kl_coef=0.0,
        recorded=torch.zeros(n, dtype=torch.bool),
    )


def loss_of(algorithm: Algorithm, reward: float, value: float, logprobs: Tensor) -> Tensor:
    inputs = scores(f64(reward), [0], f64(value))
    return algorithm.loss(one_completion(algorithm.advantage(inputs), logprobs, f64(*REFERENCE))).loss


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_lol", 1.0917552),
        ("a_lol_seq", 1.6392480),
        ("a_lol_ref_free", 1.8),
        # R in place of A: .8 * .606531 * 6
        ("r_lol", 0.8 / 0.3 * 1.0917552),
        ("weighted_bc", 0.8 * 6),
        # the weights are max(p, .1) = .367879, .135335, .1
        ("r_gold", 0.8 * (0.367879 * 1 + 0.135335 * 2 + 0.1 * 3)),
        ("sft", 6 / 3),
    ],
)
def test_the_loss_is_the_number_worked_out_by_hand(name: str, expected: float):
    # R .8, V .5, NLL 6, of the reference 5.5
    loss = loss_of(IMITATION[name](), 0.8, 0.5, f64(*LOGPROBS))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_of_a_lol_kl_is_added_whatever_the_advantage():
    algorithm = IMITATION["a_lol_kl"](ratio_penalty=0.1)
    assert loss_of(algorithm, 0.8, 0.5, f64(*LOGPROBS)).item() == pytest.approx(1.8 + 0.1 * (5.5 - 6))
    logprobs = f64(*LOGPROBS).requires_grad_()
    loss_of(algorithm, 0.2, 0.5, logprobs).backward()
    torch.testing.assert_close(logprobs.grad, f64(0.1, 0.1, 0.1))
    assert algorithm.learns_at_zero(0.0)
    assert not IMITATION["a_lol_kl"]().learns_at_zero(0.0)


@pytest.mark.parametrize("name", A_LOL)
def test_a_completion_below_its_prompts_value_has_loss_and_gradient_zero(name: str):
    logprobs = f64(*LOGPROBS).requires_grad_()
    loss = loss_of(IMITATION[name](), 0.5, 0.8, logprobs)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None
    assert (logprobs.grad == 0.0).all()


@given(
    tokens=st.lists(st.tuples(*[st.floats(-8, -0.01)] * 2), min_size=1, max_size=6),
    reward=st.floats(0.0, 1.0),
)
def test_the_composed_losses_are_those_of_the_plain_functions(
    tokens: list[tuple[float, float]], reward: float
):
    logprobs, reference = (f64(*column) for column in zip(*tokens, strict=True))
    for name, ratio in (("a_lol", "sequence"), ("a_lol_seq", "token"), ("a_lol_ref_free", "none")):
        algorithm = IMITATION[name]()
        inputs = scores(f64(reward), [0], f64(0.4))
        mine, plain = (logprobs.clone().requires_grad_() for _ in range(2))
        got = algorithm.loss(one_completion(algorithm.advantage(inputs), mine, reference)).loss
        sequence, mask = (torch.zeros(len(plain), dtype=t) for t in (torch.long, torch.bool))
        expected = a_lol(plain, reference, f64(reward - 0.4), sequence, ~mask, ratio=ratio).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, y)[0] for x, y in ((got, mine), (expected, plain)))
        )


@given(tokens=st.lists(st.floats(-8, -0.01), min_size=1, max_size=6), reward=st.floats(0.0, 1.0))
def test_where_the_policy_is_the_reference_a_lol_is_its_reference_free_form(
    tokens: list[float], reward: float
):
    results: list[Tensor] = []
    for name in A_LOL:
        algorithm, logprobs = IMITATION[name](), f64(*tokens).requires_grad_()
        advantage = algorithm.advantage(scores(f64(reward), [0], f64(0.4)))
        loss = algorithm.loss(one_completion(advantage, logprobs, logprobs.detach())).loss
        results.append(torch.autograd.grad(loss, logprobs)[0])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_only_those_with_a_ratio_or_a_kl_need_a_reference():
    needs = {name for name, build in IMITATION.items() if build().needs_reference}
    assert needs == {"a_lol", "a_lol_seq", "a_lol_kl", "r_lol", "distill"}
    assert all(build().from_data for build in IMITATION.values())
    assert {n for n, build in IMITATION.items() if build().needs_prompt_value} == {*A_LOL, "a_lol_kl"}
    assert IMITATION["awr"](baseline="prompt_value").needs_prompt_value


def weights(rewards: Tensor, group: list[int], **settings: Any) -> Tensor:
    return IMITATION["awr"](**settings).advantage(scores(rewards, group))


def test_weights_of_awr_are_the_numbers_worked_out_by_hand():
    plain: dict[str, Any] = {"baseline": "none", "standardize": False, "normalize": False}
    got = weights(f64(-1, 0, 1, 2), [0, 1, 2, 3], **plain)
    torch.testing.assert_close(got, f64(0.367879, 1, 2.718282, 7.389056), rtol=0, atol=1e-6)
    got = weights(f64(-1, 0, 1, 2), [0, 1, 2, 3], temperature=1 / 3, max_weight=100.0, **plain)
    torch.testing.assert_close(got, f64(0.049787, 1, 20.085537, 100), rtol=0, atol=1e-6)
    shares = weights(f64(-1, 0, 1, 2), [0, 1, 2, 3], **(plain | {"normalize": True})) / 4
    torch.testing.assert_close(shares, f64(0.032059, 0.087144, 0.236883, 0.643914), rtol=0, atol=1e-6)


def test_its_loss_is_that_of_the_plain_function():
    algorithm = IMITATION["awr"](baseline="group_mean", standardize=False, normalize=False)
    inputs = scores(f64(0.0, 1.0), [0, 0])
    batch = one_completion(f64(0.0), f64(-1.0, -2.0), f64(-1.0, -1.0))
    batch = replace(batch, advantages=algorithm.advantage(inputs))
    expected = awr(f64(-1.0, -2.0), f64(-0.5, 0.5)).mean()
    torch.testing.assert_close(algorithm.loss(batch).loss, expected)


@given(rewards=st.lists(st.floats(-3, 3), min_size=2, max_size=8), shift=st.floats(-5, 5))
def test_only_normalised_weights_do_not_change_with_a_constant_reward(rewards: list[float], shift: float):
    group = list(range(len(rewards)))
    settings: dict[str, Any] = {"baseline": "none", "standardize": False, "max_weight": 1e9}
    before, after = (weights(f64(*rewards) + s, group, **settings) for s in (0.0, shift))
    torch.testing.assert_close(before, after)
    assert before.mean().item() == pytest.approx(1.0)
    raw = [weights(f64(*rewards) + s, group, **settings, normalize=False) for s in (0.0, shift)]
    torch.testing.assert_close(raw[1], raw[0] * f64(shift).exp())


def test_a_temperature_counts_in_standard_deviations_when_standardised():
    small, large = (weights(f64(0, 1, 2, 5) * s, [0, 1, 2, 3], baseline="none") for s in (0.01, 100.0))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=0)
    # rewards that are all equal weigh 1 each, whatever the rounding of their mean
    assert weights(f64(0.1, 0.1, 0.1), [0, 1, 2], baseline="none").tolist() == [1.0, 1.0, 1.0]


def test_a_baseline_is_of_the_group():
    settings: dict[str, Any] = {"standardize": False, "normalize": False}
    got = weights(f64(0.0, 1.0, 5.0, 5.0), [0, 0, 1, 1], baseline="leave_one_out", **settings)
    torch.testing.assert_close(got, f64(-1.0, 1.0, 0.0, 0.0).exp())


def test_the_best_of_each_group_is_learned_from_the_first_of_equals():
    rewards = f64(0.2, 0.9, 0.9, 0.0, 0.0, 0.3)
    advantage = IMITATION["best_of"]().advantage
    assert advantage(scores(rewards, [0, 0, 0, 1, 1, 2])).tolist() == [0, 1, 0, 0, 0, 1]


def test_and_only_if_it_is_better_than_what_the_prompt_is_worth():
    algorithm = IMITATION["best_of"](baseline="prompt_value")
    inputs = scores(f64(0.2, 0.9, 0.3, 0.4), [0, 0, 1, 1], f64(0.5, 0.5, 0.5, 0.5))
    assert algorithm.advantage(inputs).tolist() == [0, 1, 0, 0]
    assert not algorithm.pointwise


def test_weights_of_tokens_are_those_of_their_own_advantages():
    # gamma 1 and lambda 1: the reward, 2, less the value of each token; the mask hides the third one
    inputs = AdvantageInputs(
        rewards=f64(2.0),
        objectives=f64(2.0)[:, None],
        objective_weights=torch.ones(1),
        group=torch.tensor([0]),
        token_penalty=torch.zeros(4, dtype=torch.float64),
        sequence=torch.zeros(4, dtype=torch.long),
        loss_mask=torch.tensor([True, True, False, True]),
        turn=torch.zeros(4, dtype=torch.long),
        values=f64(1.0, 2.0, torch.nan, 4.0),
    )
    critic = CriticLoss(lam=1.0, value_clip=None)
    plain = IMITATION["awr_token"](critic=critic, standardize=False, normalize=False)
    expected = f64(1.0, 0.0, -torch.inf, -2.0).exp()
    torch.testing.assert_close(plain.advantage(inputs), expected)
    shares = IMITATION["awr_token"](critic=critic, standardize=False).advantage(inputs)
    torch.testing.assert_close(shares, expected / (expected.sum() / 3))
    standard = IMITATION["awr_token"](critic=critic, normalize=False).advantage(inputs)
    deviation = f64(1.0, 0.0, -2.0).std()
    torch.testing.assert_close(standard[0], ((1 + 1 / 3) / deviation).exp())
    assert plain.critic is critic
    assert plain.from_data is not None and not plain.needs_reference


@given(
    exponents=st.lists(st.floats(-3, 3), min_size=2, max_size=6),
    share=st.floats(0.05, 0.95),
    divergence=st.floats(0.05, 2.0),
)
def test_the_dual_falls_until_the_weights_differ_by_the_divergence(
    exponents: list[float], share: float, divergence: float
):
    """Its slope in the factor is divergence - KL(w || equal weights), w ~ exp(A / factor)."""
    temperature = PromptTemperature(divergence, lambda inputs: inputs.rewards)
    factor = factor_of(f64(share)).requires_grad_()
    # a group of another size beside it, padded
    rows = torch.cat([f64(*exponents), f64(torch.nan)])[None]
    there = torch.tensor([[True] * len(exponents) + [False]])
    slope = torch.autograd.grad(temperature.dual(factor, rows, there).sum(), factor)[0]
    weights = (f64(*exponents) / factor.detach()).softmax(0)
    divergence_of_weights = (weights * (weights * len(weights)).log()).sum()
    torch.testing.assert_close(slope[0], divergence - divergence_of_weights)


def test_a_balance_multiplies_the_temperature_of_its_prompt():
    settings: dict[str, Any] = {"baseline": "none", "standardize": False, "normalize": False}
    algorithm = IMITATION["awr"](divergence=0.5, **settings)
    inputs = replace(scores(f64(0, 1, 0, 1), [0, 0, 1, 1]), temperature_factors=f64(0.5, 0.5, 4.0, 4.0))
    torch.testing.assert_close(algorithm.advantage(inputs), f64(0, 2, 0, 0.25).exp())
    assert algorithm.prompt_temperature is not None
    torch.testing.assert_close(algorithm.prompt_temperature.exponents(inputs), f64(0, 1, 0, 1))
    torch.testing.assert_close(factor_of(f64(0, 0.5, 1)), f64(0.1, 1, 10))
    assert IMITATION["awr"](**settings).prompt_temperature is None


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"max_weight": -1.0}, {"divergence": 0.0}])
def test_settings_of_awr_are_above_zero(settings: dict[str, float]):
    with pytest.raises(ValueError, match="above 0"):
        IMITATION["awr"](**settings)


@pytest.mark.parametrize("name", [name for name in IMITATION if name not in ("sft", "awr_token")])
def test_a_completion_without_a_reward_weighs_nothing(name: str):
    got = IMITATION[name]().advantage(scores(f64(1.0, torch.nan, 0.5), [0, 0, 0], f64(0.2, 0.2, 0.2)))
    assert got[1].item() == 0.0
    assert got.isfinite().all()


def test_without_an_engines_log_probs_no_mismatch_is_reported_or_corrected():
    algorithm = IMITATION["weighted_bc"]()
    batch = one_completion(f64(1.0), f64(*LOGPROBS), f64(*REFERENCE))
    assert not any(name.startswith("mismatch/") for name in algorithm.loss(batch).metrics)
    known = replace(batch, recorded=torch.tensor([True, False, False]), rollout_logprobs=f64(-1.5, 9.0, 9.0))
    from rlhf.algos.algorithm import TOKEN_TIS

    corrected = replace(algorithm, mismatch=TOKEN_TIS).loss(known)
    # only the first token is reweighted, by exp(-1 + 1.5)
    assert corrected.loss.item() == pytest.approx(f64(0.5).exp().item() * 1 + 2 + 3)
    assert corrected.metrics["mismatch/ratio_max"].value == pytest.approx(f64(0.5).exp().item())
    gap = f64(0.5)
    assert corrected.metrics["mismatch/k3"].value == pytest.approx((gap.exp() - 1 - gap).item())
