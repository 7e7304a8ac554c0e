"""Rewards of steps: what each token is credited with, by hand, and which algorithms ask at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.advantage import by_step, group_normalize, per_sequence, reinforce_pp_advantage
from rlhf.algos.critic import CriticLoss, token_rewards
from rlhf.algos.table import ALGORITHMS, ppo
from rlhf.preflight.probe import credits_steps
from rlhf.tensors.steps import StepRewards
from rlhf.types import AdvantageInputs

NAN = float("nan")
# what the tests of all algorithms give to those that have no default
REQUIRED: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_tokens": 8},
    "dapo": {"max_tokens": 8},
    "cispo": {"max_tokens": 8, "clip_high": 5.0},
    "dtpo": {"tool_objectives": ("tool",)},
}


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def made(at: Tensor, rest: Tensor, lengths: list[int], groups: list[int] | None = None) -> AdvantageInputs:
    """Completions of these lengths, of one group unless `groups` says otherwise; a value of 0 everywhere."""
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rewards = rest.index_add(0, sequence, at.nan_to_num(nan=0.0))
    return AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=rewards.new_ones(1),
        group=torch.zeros(len(lengths), dtype=torch.long) if groups is None else torch.tensor(groups),
        token_penalty=torch.zeros_like(at),
        sequence=sequence,
        loss_mask=torch.ones(len(at), dtype=torch.bool),
        turn=torch.zeros(len(at), dtype=torch.long),
        values=torch.zeros_like(at),
        prompt_values=torch.zeros_like(rewards),
        temperature_factors=torch.ones_like(rewards),
        steps=StepRewards(at, rest),
    )


# four tokens with steps that earned 1 and 0, three with steps that earned 0 and -1
AT = f64(NAN, 1, NAN, 0, 0, NAN, -1)


def test_grpo_with_process_supervision_is_the_sum_of_the_later_normalised_steps():
    # 1, 0, 0, -1: mean 0, unbiased variance 2/3, so 1 becomes sqrt(3/2) = 1.224745
    got = by_step(made(AT, f64(0, 0), [4, 3]))
    torch.testing.assert_close(got, 1.224745 * f64(1, 1, 0, 0, -1, -1, -1), rtol=0, atol=1e-5)
    # an outcome of 1 and 0 besides: sqrt(1/2) = .707107 for all tokens of the first, minus it for the second
    both = by_step(made(AT, f64(1, 0), [4, 3]))
    torch.testing.assert_close(both - got, 0.707107 * f64(1, 1, 1, 1, -1, -1, -1), rtol=0, atol=1e-5)


def test_reinforce_pp_whitens_what_is_still_to_come():
    # to come: 1 1 0 0 -1 -1 -1; mean -1/7, squares 5, variance (5 - 1/7) / 6 = .809524, deviation .899735
    got = reinforce_pp_advantage(made(AT, f64(0, 0), [4, 3]))
    # (8/7, 1/7, -6/7) / .899735
    expected = f64(1.270215, 1.270215, 0.158777, 0.158777, -0.952661, -0.952661, -0.952661)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_gae_sees_the_reward_of_a_step_where_it_ends():
    x = made(AT[:4], f64(0.3), [4])
    assert token_rewards(x).tolist() == [0.0, 1.0, 0.0, 0.3]
    # lambda 1/2, values 0: .3, then .15, then 1 + .075, then half of it
    critic = CriticLoss(lam=0.5)
    assert critic.advantages(x).tolist() == pytest.approx([0.5375, 1.075, 0.15, 0.3])
    assert critic.targets(x).returns.tolist() == pytest.approx([0.5375, 1.075, 0.15, 0.3])


def test_the_names_that_learn_which_step_earned_what():
    found = {name for name in ALGORITHMS if credits_steps(ALGORITHMS[name](**REQUIRED.get(name, {})))}
    assert found == {"grpo_ps", "reinforce_pp", "ppo", "ppo_max", "vapo", "awr_token"}


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def random_inputs(lengths: list[int], seed: int) -> AdvantageInputs:
    generator = torch.Generator().manual_seed(seed)
    n, s = sum(lengths), len(lengths)
    at = torch.randn(n, generator=generator, dtype=torch.float64)
    at[torch.rand(n, generator=generator) < 0.5] = NAN
    rest = torch.randn(s, generator=generator, dtype=torch.float64)
    return made(at, rest, lengths, [i // 2 for i in range(s)])


@given(lengths=lengths, seed=st.integers(0, 99))
def test_all_others_learn_from_the_sum_as_if_no_step_had_been_named(lengths: list[int], seed: int):
    x = random_inputs(lengths, seed)
    for name in ("grpo", "rloo", "reinforce_pp_baseline", "gdpo", "best_of", "awr"):
        advantage = ALGORITHMS[name]().advantage
        assert torch.equal(advantage(x), advantage(replace(x, steps=None)))


@given(lengths=lengths, seed=st.integers(0, 99))
def test_a_step_at_the_last_token_is_an_outcome(lengths: list[int], seed: int):
    x = random_inputs(lengths, seed)
    last = torch.tensor(lengths).cumsum(0) - 1
    at = torch.full_like(x.token_penalty, NAN).index_put((last,), x.rewards)
    for advantage in (reinforce_pp_advantage, ppo(critic=CriticLoss(lam=0.7)).advantage):
        by_steps = advantage(replace(x, steps=StepRewards(at, torch.zeros_like(x.rewards))))
        torch.testing.assert_close(by_steps, advantage(replace(x, steps=None)), rtol=0, atol=1e-12)
    # and so for the comparison of steps, where each completion is one step of its group
    one_each = by_step(replace(x, steps=StepRewards(at, torch.zeros_like(x.rewards))))
    torch.testing.assert_close(one_each, per_sequence(group_normalize)(x), rtol=0, atol=1e-12)


@given(lengths=lengths, seed=st.integers(0, 99))
def test_comparing_steps_is_the_double_sum_of_the_paper(lengths: list[int], seed: int):
    x = random_inputs(lengths, seed)
    assert x.steps is not None
    x = replace(x, steps=StepRewards(x.steps.at, torch.zeros_like(x.rewards)))
    assert x.steps is not None
    got, n = by_step(x), len(x.sequence)
    for group in set(x.group.tolist()):
        mine = [t for t in range(n) if x.group[x.sequence[t]] == group]
        steps = {t: x.steps.at[t].item() for t in mine if not x.steps.at[t].isnan()}
        values = torch.tensor(list(steps.values()), dtype=torch.float64)
        std = values.std().item() if len(values) > 1 else 0.0
        scaled = {t: (r - values.mean().item()) / (std + 1e-6) if std else 0.0 for t, r in steps.items()}
        for t in mine:
            later = sum(r for u, r in scaled.items() if u >= t and x.sequence[u] == x.sequence[t])
            assert got[t].item() == pytest.approx(later, abs=1e-9)
