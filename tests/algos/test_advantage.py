from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.advantage import (
    by_turn,
    gdpo,
    group_center,
    group_normalize,
    leave_one_out,
    per_sequence,
    reinforce_pp,
    reinforce_pp_baseline,
    whiten,
)
from rlhf.kernels.gae import gae
from rlhf.types import AdvantageInputs

BASELINES: list[Callable[..., Tensor]] = [group_normalize, group_center, leave_one_out]
floats = st.floats(-10.0, 10.0, allow_nan=False, width=32)
ragged = st.lists(st.lists(floats, min_size=1, max_size=6), min_size=1, max_size=5)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def flat(groups: list[list[float]]) -> tuple[Tensor, Tensor]:
    ids = [i for i, rewards in enumerate(groups) for _ in rewards]
    return f64(*(r for rewards in groups for r in rewards)), torch.tensor(ids)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("baseline", "rewards", "expected"),
    [
        (group_normalize, [1, 0, 0, 1], [0.866024, -0.866024, -0.866024, 0.866024]),
        (group_normalize, [1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999]),
        (group_center, [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        (leave_one_out, [1, 0, 0, 1], [0.666667, -0.666667, -0.666667, 0.666667]),
        (leave_one_out, [1, 0, 0, 0], [1.0, -0.333333, -0.333333, -0.333333]),
    ],
)
def test_group_advantages_are_the_numbers_worked_out_by_hand(
    baseline: Callable[..., Tensor], rewards: list[int], expected: list[float]
):
    torch.testing.assert_close(
        baseline(f64(*rewards), torch.zeros(4, dtype=torch.long)), f64(*expected), rtol=0, atol=1e-6
    )
    as_row = baseline(f64(*rewards).reshape(1, 4))
    torch.testing.assert_close(as_row, f64(*expected).reshape(1, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
@given(groups=ragged)
def test_a_group_is_judged_by_itself_whatever_its_size(
    baseline: Callable[..., Tensor], groups: list[list[float]]
):
    together = baseline(*flat(groups))
    apart = torch.cat([baseline(f64(*rewards).reshape(1, -1))[0] for rewards in groups])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("baseline", BASELINES)
@given(groups=ragged, data=st.data())
def test_adding_a_constant_to_all_rewards_of_a_group_changes_nothing(
    baseline: Callable[..., Tensor], groups: list[list[float]], data: st.DataObject
):
    # quarters and a shift of whole numbers: their sums are exact, so equal rewards stay equal
    groups = [[round(4 * r) / 4 for r in rewards] for rewards in groups]
    shifts = data.draw(st.lists(st.integers(-100, 100), min_size=len(groups), max_size=len(groups)))
    rewards, ids = flat(groups)
    shifted = baseline(rewards + torch.tensor(shifts)[ids], ids)
    torch.testing.assert_close(shifted, baseline(rewards, ids), rtol=0, atol=1e-9)


@given(groups=ragged, scale=st.floats(0.5, 100.0))
def test_scaling_the_rewards_changes_no_normalised_advantage(groups: list[list[float]], scale: float):
    # by whole numbers, so that a spread is never as small as eps
    rewards, ids = flat([[round(r) for r in rewards] for rewards in groups])
    torch.testing.assert_close(
        group_normalize(rewards * scale, ids), group_normalize(rewards, ids), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("baseline", BASELINES)
@given(groups=ragged)
def test_the_advantages_of_a_group_add_up_to_zero(baseline: Callable[..., Tensor], groups: list[list[float]]):
    rewards, ids = flat(groups)
    totals = torch.zeros(len(groups), dtype=torch.float64).index_add(0, ids, baseline(rewards, ids))
    torch.testing.assert_close(totals, torch.zeros_like(totals), rtol=0, atol=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
@given(reward=floats, size=st.integers(1, 50))
def test_equal_rewards_have_no_advantage_at_all_in_fp32(
    baseline: Callable[..., Tensor], reward: float, size: int
):
    assert (baseline(torch.full((1, size), reward)) == 0.0).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_missing_reward_counts_for_nothing(baseline: Callable[..., Tensor]):
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    got = baseline(f64(1.0, torch.nan, 0.0, 2.0, 5.0, torch.nan), ids)
    assert got[[1, 5]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(
        got[[0, 2, 3, 4]], baseline(f64(1.0, 0.0, 2.0, 5.0), torch.tensor([0, 0, 1, 1]))
    )


def test_rewards_without_groups_are_refused():
    with pytest.raises(
        ValueError, match=r"without group, rewards must be \[P, G\], one row for each group; got shape \[4\]"
    ):
        group_normalize(torch.zeros(4))
    with pytest.raises(ValueError, match=r"rewards and group must both be \[S\]"):
        group_normalize(torch.zeros(2, 2), torch.zeros(4, dtype=torch.long))


ONE_GROUP = torch.zeros(4, dtype=torch.long)


def test_gdpo_is_the_numbers_worked_out_by_hand():
    weights = f64(1.0, 1.0)
    rewards = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.float64)
    expected = f64(0.0, 0.0, 1.224658, -1.224658)
    torch.testing.assert_close(gdpo(rewards, ONE_GROUP, weights), expected, rtol=0, atol=1e-6)
    z = group_normalize(rewards[:, 0], ONE_GROUP, eps=1e-4)
    torch.testing.assert_close(z.abs(), torch.full_like(z, 0.865875), rtol=0, atol=1e-6)
    # what the normalisation of the batch makes of .365975 -1.365775 2.365575 -1.365775
    rewards = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]], dtype=torch.float64)
    before = f64(0.365975, -1.365775, 2.365575, -1.365775)
    expected = (before - before.mean()) / (before.std() + 1e-4)
    torch.testing.assert_close(gdpo(rewards, ONE_GROUP, weights), expected, rtol=0, atol=2e-6)
    grpo = group_normalize(rewards.sum(1), ONE_GROUP, eps=1e-4)
    torch.testing.assert_close(grpo, f64(0.261089, -0.783268, 1.305446, -0.783268), rtol=0, atol=1e-6)


def test_gdpo_of_one_objective_is_grpo_up_to_scale():
    rewards = f64(1.0, 0.5, 0.0, 0.25)
    one, other = gdpo(rewards[:, None], ONE_GROUP, f64(2.0)), group_normalize(rewards, ONE_GROUP)
    torch.testing.assert_close(one / one.norm(), other / other.norm())


def test_an_objective_without_variance_has_no_part_in_gdpo():
    rewards = f64(1.0, 0.5, 0.0, 0.25)
    both = gdpo(torch.stack([rewards, torch.full_like(rewards, 0.3)], 1), ONE_GROUP, f64(1.0, 5.0))
    torch.testing.assert_close(both, gdpo(rewards[:, None], ONE_GROUP, f64(1.0)), rtol=0, atol=0)


def test_a_sequence_without_any_objective_does_not_reach_the_batch():
    rewards = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.float64)
    with_missing = torch.cat([rewards, torch.full((1, 2), torch.nan, dtype=torch.float64)])
    got = gdpo(with_missing, torch.zeros(5, dtype=torch.long), f64(1.0, 1.0))
    assert got[4] == 0.0
    torch.testing.assert_close(got[:4], gdpo(rewards, ONE_GROUP, f64(1.0, 1.0)))


def test_gdpo_tells_apart_what_the_sum_of_rewards_cannot():
    # sums {0, 1} in one group and {0, 2} in the other: the same to GRPO
    rewards = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1]], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    summed = group_normalize(rewards.sum(1), group)
    torch.testing.assert_close(summed.abs(), torch.full_like(summed, 0.7071068), rtol=0, atol=2e-6)
    apart = gdpo(rewards, group, f64(1.0, 1.0))
    assert apart[3] > 1.5 * apart[1]


def test_whitening_leaves_mean_zero_and_variance_one():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50) % 3 > 0
    white = whiten(x, mask)
    assert white[~mask].abs().max() == 0.0
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert white[mask].std().item() == pytest.approx(1.0, abs=1e-6)


def test_whitening_over_two_ranks_is_whitening_over_their_union():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(20) % 4 > 0

    def first_rank(sums: list[Tensor]) -> Callable[[Tensor], Tensor]:
        # the other rank's numbers, in the order in which the sums are asked for
        return lambda t: t + sums.pop(0)

    other = x[8:].masked_fill(~mask[8:], 0.0)
    mean = x[mask].mean()
    sums = [torch.stack([mask[8:].sum().double(), other.sum()]), ((x[8:] - mean)[mask[8:]] ** 2).sum()]
    torch.testing.assert_close(whiten(x[:8], mask[:8], all_sum=first_rank(sums)), whiten(x, mask)[:8])


@pytest.mark.parametrize("n", [0, 1, 9])
def test_whitening_equal_numbers_is_exactly_zero(n: int):
    assert (whiten(torch.full((9,), 0.1), torch.arange(9) < n) == 0.0).all()


def test_reinforce_pp_is_the_reward_to_go_whitened():
    # two sequences; the tool's token in the middle of the first is skipped
    sequence = torch.tensor([0, 0, 0, 1, 1])
    mask = torch.tensor([1, 0, 1, 1, 1], dtype=torch.bool)
    penalty = f64(0.1, 7.0, 0.2, -0.3, 0.4)
    got = reinforce_pp(f64(1.0, 0.0), penalty, sequence, mask)
    to_go = f64(0.7, 0.0, 0.8, -0.1, -0.4)
    torch.testing.assert_close(got, whiten(to_go, mask))
    assert got[1] == 0.0


def test_reinforce_pp_baseline_is_the_centred_reward_whitened():
    sequence = torch.tensor([0, 0, 1, 2, 2, 2])
    group = torch.tensor([0, 0, 0])
    got = reinforce_pp_baseline(f64(1.0, 0.0, 2.0), group, sequence, ones(6))
    torch.testing.assert_close(got, whiten(f64(0, 0, -1, 1, 1, 1), ones(6)))


def test_a_missing_reward_does_not_reach_the_batch():
    sequence = torch.tensor([0, 0, 1, 2])
    got = reinforce_pp(f64(1.0, torch.nan, 0.0), torch.zeros(4, dtype=torch.float64), sequence, ones(4))
    assert got.isfinite().all()
    assert got[2] == 0.0
    got = reinforce_pp_baseline(f64(1.0, torch.nan, 0.0), torch.tensor([0, 0, 0]), sequence, ones(4))
    assert got.isfinite().all()
    assert got[2] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_gdpo_leaves_a_group_without_signal_at_exactly_zero(seed: int):
    mixed = torch.rand(9, 2, generator=torch.Generator().manual_seed(seed))
    objectives = torch.cat([mixed, torch.full((4, 2), 0.3)])
    group = torch.tensor([0] * 4 + [1] * 5 + [2] * 4)
    got = gdpo(objectives, group, torch.tensor([1.0, 0.3]))
    assert (got[9:] == 0).all() and (got[:9] != 0).all()
    assert got.mean().abs() < 1e-6


def test_without_any_reward_there_is_nothing_to_compare():
    none, group = torch.empty(0, 0), torch.empty(0, dtype=torch.long)
    assert gdpo(none, group, torch.empty(0)).shape == (0,)
    assert group_normalize(torch.empty(0), group).shape == (0,)


def test_a_penalty_in_the_reward_is_summed_over_the_sequence():
    inputs = AdvantageInputs(
        rewards=f64(1.0, 1.0),
        objectives=torch.ones(2, 1, dtype=torch.float64),
        objective_weights=f64(1.0),
        group=torch.tensor([0, 0]),
        token_penalty=f64(0.1, 0.2, 5.0, 0.5),
        sequence=torch.tensor([0, 0, 0, 1]),
        loss_mask=torch.tensor([1, 1, 0, 1], dtype=torch.bool),
        turn=torch.zeros(4, dtype=torch.long),
    )
    got = per_sequence(leave_one_out)(inputs)
    torch.testing.assert_close(got, f64(0.2, 0.2, 0.0, -0.2))


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (0.95, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1.0]),
        (1.0, [0.5, 0.4, 0.3], [1.0, 1.0, 1.0]),
        (0.0, [0.1, 0.1, 0.3], [0.6, 0.7, 1.0]),
    ],
)
def test_gae_is_the_numbers_worked_out_by_hand(lam: float, advantages: list[float], returns: list[float]):
    got = gae(f64(0, 0, 1), f64(0.5, 0.6, 0.7), torch.tensor([0, 0, 0]), ones(3), lam=lam)
    torch.testing.assert_close(got, (f64(*advantages), f64(*returns)), rtol=0, atol=1e-12)


def test_gae_after_a_penalty_in_the_reward():
    rewards = -0.05 * (f64(-1, -2, -0.5) - f64(-1.2, -1.5, -0.5)) + f64(0, 0, 1)
    torch.testing.assert_close(rewards, f64(-0.01, 0.025, 1.0))
    got = gae(rewards, f64(0.5, 0.6, 0.7), torch.tensor([0, 0, 0]), ones(3))
    torch.testing.assert_close(got, (f64(0.4795, 0.41, 0.3), f64(0.9795, 1.01, 1.0)), rtol=0, atol=1e-12)


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def walk(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rewards, values = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return rewards, values, sequence


@given(lengths=lengths, seed=st.integers(0, 99), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_recursion_written_out(lengths: list[int], seed: int, gamma: float, lam: float):
    rewards, values, sequence = walk(lengths, seed)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.7
    expected = torch.zeros_like(values)
    for s in range(len(lengths)):
        advantage = next_value = 0.0
        for t in reversed(((sequence == s) & mask).nonzero().flatten().tolist()):
            delta = rewards[t].item() + gamma * next_value - values[t].item()
            advantage = delta + gamma * lam * advantage
            next_value = values[t].item()
            expected[t] = advantage
    got, returns = gae(rewards, values, sequence, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(returns, (expected + values).masked_fill(~mask, 0.0))


@given(lengths=lengths, seed=st.integers(0, 99))
def test_gae_with_lambda_one_is_return_minus_value(lengths: list[int], seed: int):
    _, values, sequence = walk(lengths, seed)
    rewards, last = torch.zeros_like(values), torch.tensor(lengths).cumsum(0) - 1
    rewards[last] = 1.0 + torch.arange(len(lengths), dtype=torch.float64)
    got, returns = gae(rewards, values, sequence, ones(len(values)), lam=1.0)
    torch.testing.assert_close(got, (1.0 + sequence) - values)
    torch.testing.assert_close(returns, 1.0 + sequence.double())


def test_gae_of_tokens_that_are_all_masked_is_zero():
    got = gae(f64(1, 2), f64(3, 4), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool))
    assert all((x == 0.0).all() for x in got)


def episodes(objectives: dict[str, list[float]], turns: list[list[int]], **changes: Any) -> AdvantageInputs:
    """One group; each token stands for its turn."""
    rows = torch.tensor([*objectives.values()], dtype=torch.float64).T
    sequence = torch.arange(len(turns)).repeat_interleave(torch.tensor([len(t) for t in turns]))
    made = AdvantageInputs(
        rewards=rows.nansum(1),
        objectives=rows,
        objective_weights=torch.ones(len(objectives)),
        group=torch.zeros(len(turns), dtype=torch.long),
        token_penalty=torch.zeros(len(sequence), dtype=torch.float64),
        sequence=sequence,
        loss_mask=torch.ones(len(sequence), dtype=torch.bool),
        turn=torch.tensor([turn for of_one in turns for turn in of_one]),
        names=tuple(objectives),
    )
    return replace(made, **changes)


# the first completion and the last one answer at once
ADAPTVISION = {"outcome": [1.5, 1.4, 0.5, 0.5], "crop": [0.0, 0.08, 0.1, 0.0]}
TURNS = [[0], [0, 1], [0, 1], [0]]


def test_only_the_first_turn_has_the_advantage_of_the_tool():
    got = by_turn(["crop"], 0.3, eps=1e-4)(episodes(ADAPTVISION, TURNS))
    # z(outcome) = .954372 .772587 -.863479 -.863479, z(crop) = -.853904 .664148 1.043661 -.853904
    first, later = [0.698201, 0.971831, -0.550381, -1.119651], [0.772587, -0.863479]
    expected = [first[0], first[1], later[0], first[2], later[1], first[3]]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    # .954372 - .3 * .853904
    assert pytest.approx(first[0], abs=1e-6) == 0.954372 - 0.3 * 0.853904
    # the deviation of 1.5, 1.4, .5, .5 is .550: an eps of 1e-6 gives .954544
    exact = by_turn(["crop"], 0.0)(episodes(ADAPTVISION, TURNS))
    assert exact[0].item() == pytest.approx(0.954544, abs=1e-6)


def test_weights_of_objectives_come_before_they_are_normalised():
    parts = {"right": [1.0, 1.0, 0.0, 0.0], "format": [1.0, 0.8, 1.0, 1.0], "crop": [0.0, 0.8, 1.0, 0.0]}
    # 1 * right + .5 * format = 1.5, 1.4, .5, .5 and .1 * crop = 0, .08, .1, 0
    weighted = episodes(parts, TURNS, objective_weights=torch.tensor([1.0, 0.5, 0.1]))
    expected = by_turn(["crop"], 0.3)(episodes(ADAPTVISION, TURNS))
    torch.testing.assert_close(by_turn(["crop"], 0.3)(weighted), expected, rtol=0, atol=1e-5)


def test_without_a_coefficient_advantages_by_turn_are_those_of_the_outcome():
    x = episodes(ADAPTVISION, TURNS)
    outcomes = replace(x, rewards=f64(*ADAPTVISION["outcome"]))
    assert torch.equal(by_turn(["crop"], 0.0)(x), per_sequence(group_normalize)(outcomes))
    # a name that no completion has is nothing
    assert torch.equal(by_turn(["zoom"], 0.3)(x), per_sequence(group_normalize)(x))


def test_what_has_no_tool_reward_is_compared_with_no_tool_reward():
    some = {"outcome": [1.5, 1.4, 0.5, 0.5], "crop": [torch.nan, 0.08, 0.1, torch.nan]}
    got = by_turn(["crop"], 1.0)(episodes(some, TURNS)) - by_turn(["crop"], 0.0)(episodes(some, TURNS))
    # of two, +-(d / 2) / (d / sqrt 2 + eps) with d = .02: .7071 less .7071 * 1e-6 / .01414
    assert got.tolist() == pytest.approx([0.0, -0.707057, 0.0, 0.707057, 0.0, 0.0], abs=1e-6)
    lost = {"outcome": [1.0, torch.nan, 0.0, 0.0], "crop": [0.0, torch.nan, 0.0, 0.0]}
    assert by_turn(["crop"], 1.0)(episodes(lost, TURNS))[1:3].tolist() == [0.0, 0.0]


def test_a_penalty_in_the_reward_is_taken_off_the_outcome():
    penalty = f64(0.1, 0.2, 0.2, 0.0, 0.0, 0.0)
    got = by_turn(["crop"], 0.0)(episodes(ADAPTVISION, TURNS, token_penalty=penalty))
    less = {"outcome": [1.5 - 0.1, 1.4 - 0.4, 0.5, 0.5], "crop": ADAPTVISION["crop"]}
    torch.testing.assert_close(got, by_turn(["crop"], 0.0)(episodes(less, TURNS)), rtol=0, atol=1e-12)
