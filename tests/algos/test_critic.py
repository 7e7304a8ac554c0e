"""Advantages and targets of a critic: the worked numbers, and laws on ragged packed sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.algorithm import KL
from rlhf.algos.critic import CriticLoss, RewardScaling, constrained, token_rewards
from rlhf.algos.table import ppo, ppo_max, vapo
from rlhf.algos.value import RunningMoments
from rlhf.types import AdvantageInputs

seeds = st.integers(0, 10_000)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def inputs(rewards: Tensor, lengths: list[int], values: Tensor, **changes: Tensor) -> AdvantageInputs:
    sizes = torch.tensor(lengths)
    made = AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=rewards.new_ones(1),
        group=torch.arange(len(lengths)),
        token_penalty=torch.zeros_like(values),
        sequence=torch.arange(len(lengths)).repeat_interleave(sizes),
        loss_mask=torch.ones(len(values), dtype=torch.bool),
        turn=torch.zeros(len(values), dtype=torch.long),
        values=values,
    )
    return replace(made, **changes)


def random_inputs(seed: int, *, masked: float = 0.3) -> AdvantageInputs:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (5,), generator=generator).tolist()
    noise = torch.randn(3, sum(lengths), generator=generator, dtype=torch.float64)
    return inputs(
        torch.randn(5, generator=generator, dtype=torch.float64),
        lengths,
        noise[0],
        token_penalty=noise[1],
        loss_mask=torch.rand(sum(lengths), generator=generator) >= masked,
    )


def in_a_loop(x: AdvantageInputs, gamma: float, lams: list[float]) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in float64: advantages and returns."""
    assert x.values is not None
    advantages, returns = torch.zeros_like(x.values), torch.zeros_like(x.values)
    for i in range(len(x.rewards)):
        mine = [t for t in range(len(x.values)) if x.sequence[t] == i and x.loss_mask[t]]
        next_value = next_advantage = 0.0
        for t in reversed(mine):
            reward = -x.token_penalty[t].item() + (x.rewards[i].item() if t == mine[-1] else 0.0)
            delta = reward + gamma * next_value - x.values[t].item()
            next_advantage = delta + gamma * lams[i] * next_advantage
            next_value = x.values[t].item()
            advantages[t], returns[t] = next_advantage, next_advantage + next_value
    return advantages, returns


def test_the_reward_with_its_kl_and_the_advantages_are_the_numbers_worked_out_by_hand():
    # lp = -1 -2 -.5 against -1.2 -1.5 -.5 at eta .05, score 1
    algorithm = ppo_max(critic=CriticLoss(lam=0.95))
    penalty = algorithm.token_penalty(f64(-1.0, -2.0, -0.5), f64(-1.2, -1.5, -0.5), 0.05)
    x = inputs(f64(1.0), [3], f64(0.5, 0.6, 0.7), token_penalty=penalty)
    assert token_rewards(x).tolist() == pytest.approx([-0.01, 0.025, 1.0])
    assert algorithm.advantage(x).tolist() == pytest.approx([0.4795, 0.41, 0.3])
    assert CriticLoss(lam=0.95).targets(x).returns.tolist() == pytest.approx([0.9795, 1.01, 1.0])


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (0.95, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1.0]),
        (1.0, [0.5, 0.4, 0.3], [1.0, 1.0, 1.0]),
        (0.0, [0.1, 0.1, 0.3], [0.6, 0.7, 1.0]),
    ],
)
def test_gae_is_the_numbers_worked_out_by_hand(lam: float, advantages: list[float], returns: list[float]):
    x, critic = inputs(f64(1.0), [3], f64(0.5, 0.6, 0.7)), CriticLoss(lam=lam)
    assert critic.advantages(x).tolist() == pytest.approx(advantages)
    assert critic.targets(x).returns.tolist() == pytest.approx(returns)


def test_rewards_scaled_by_their_history_are_the_numbers_worked_out_by_hand():
    moments = RunningMoments().update(f64(1.0, 2.0, 3.0, 4.0))
    assert (moments.mean, moments.variance, moments.std) == pytest.approx((2.5, 1.25, 1.2909944))
    moments = moments.update(f64(5.0, 7.0))
    assert (moments.mean, moments.variance, moments.std) == pytest.approx((3.6666667, 3.8888889, 2.1602469))
    normalized = RewardScaling(center=True, scale=True, clip=0.8)
    assert normalized.apply(f64(5.0, 7.0), moments).tolist() == pytest.approx([0.617213, 0.8], abs=1e-6)
    assert RewardScaling(scale=True).apply(f64(5.0), moments).item() == pytest.approx(5.0 / 2.1602469)
    # all equal so far: nothing but rounding to divide by
    flat = RunningMoments().update(torch.full((7,), 0.1))
    assert normalized.apply(torch.full((7,), 0.1), flat).abs().max() < 1e-6


@given(seed=seeds, lam=st.floats(0, 1), gamma=st.floats(0, 1))
def test_advantages_and_returns_are_those_of_the_loop(seed: int, lam: float, gamma: float):
    x, critic = random_inputs(seed), CriticLoss(lam=lam, gamma=gamma)
    advantages, returns = in_a_loop(x, gamma, [lam] * 5)
    torch.testing.assert_close(critic.advantages(x), advantages, rtol=0, atol=1e-12)
    torch.testing.assert_close(critic.targets(x).returns, returns, rtol=0, atol=1e-12)


@given(seed=seeds)
def test_the_lambda_of_vapo_follows_the_tokens_the_policy_chose_and_its_returns_are_whole(seed: int):
    x = random_inputs(seed)
    chosen = [int((x.loss_mask & (x.sequence == i)).sum()) for i in range(5)]
    critic = CriticLoss(lam_alpha=0.5, lam_returns=1.0)
    advantages, _ = in_a_loop(x, 1.0, [max(0.0, 1 - 1 / (0.5 * max(n, 1))) for n in chosen])
    torch.testing.assert_close(critic.advantages(x), advantages, rtol=0, atol=1e-6)
    torch.testing.assert_close(critic.targets(x).returns, in_a_loop(x, 1.0, [1.0] * 5)[1], rtol=0, atol=1e-12)


@given(seed=seeds)
def test_without_a_kl_and_with_lambda_1_the_advantage_is_the_score_minus_the_value(seed: int):
    x = random_inputs(seed)
    x = replace(x, token_penalty=torch.zeros_like(x.token_penalty))
    assert x.values is not None
    wanted = (x.rewards[x.sequence] - x.values).masked_fill(~x.loss_mask, 0.0)
    torch.testing.assert_close(CriticLoss(lam=1.0).advantages(x), wanted, rtol=0, atol=1e-12)


@given(seed=seeds, at=st.integers(0, 30))
def test_words_of_a_tool_anywhere_change_no_advantage(seed: int, at: int):
    x = random_inputs(seed)
    assert x.values is not None
    at = at % len(x.values)

    def inserted(row: Tensor, value: float) -> Tensor:
        return torch.cat([row[: at + 1], torch.tensor([value], dtype=row.dtype), row[at + 1 :]])

    longer = replace(
        x,
        values=inserted(x.values, 9.0),
        token_penalty=inserted(x.token_penalty, 9.0),
        sequence=inserted(x.sequence, x.sequence[at].item()),
        loss_mask=inserted(x.loss_mask, False),
        turn=inserted(x.turn, 0),
    )
    for critic in (CriticLoss(), CriticLoss(lam_alpha=0.5)):
        got = critic.advantages(longer)
        rest = torch.cat([got[: at + 1], got[at + 2 :]])
        torch.testing.assert_close(rest, critic.advantages(x), rtol=0, atol=1e-12)


def test_advantages_are_whitened_over_all_tokens_and_then_clipped():
    x = random_inputs(3, masked=0.0)
    white = constrained(CriticLoss().advantages, whitened=True, clip=None)(x)
    assert white.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert white.std().item() == pytest.approx(1.0, abs=1e-6)
    clipped = constrained(CriticLoss().advantages, whitened=True, clip=0.5)(x)
    torch.testing.assert_close(clipped, white.clamp(-0.5, 0.5))
    assert clipped.abs().max() == 0.5


def test_what_the_paper_found_to_clash_is_refused_in_its_own_algorithm_and_warned_about_in_ppo():
    for clash in ({"whiten": True}, {"advantage_clip": 0.5}):
        with pytest.raises(ValueError, match=r"algorithm\.critic\.value_clip"):
            ppo_max(**clash)  # pyright: ignore[reportArgumentType]
        ppo_max(critic=CriticLoss(value_clip=None), **clash)  # pyright: ignore[reportArgumentType]
    assert len(ppo().cautions) == len(ppo(whiten=False, advantage_clip=0.5).cautions) == 1
    assert ppo(whiten=False).cautions == ppo_max().cautions == vapo().cautions == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.1}, r"critic\.gamma"),
        ({"lam": -0.1}, r"critic\.lam "),
        ({"lam_returns": 2.0}, r"critic\.lam_returns"),
        ({"value_clip": 0.0}, r"critic\.value_clip"),
        ({"lam_alpha": 0.0}, r"critic\.lam_alpha"),
        ({"coef": 0.0}, r"critic\.coef"),
        ({"warmup_steps": -1}, r"critic\.warmup_steps"),
        ({"warmup_explained_variance": 0.5}, r"needs critic\.warmup_steps"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        CriticLoss(**settings)  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_papers():
    assert ppo_max().kl == KL(coef=0.05, estimator="k1", placement="reward")
    assert ppo_max().critic == CriticLoss(gamma=1.0, lam=0.9, value_clip=0.2, coef=1.0)
    critic = vapo().critic
    assert critic is not None
    assert (critic.lam_alpha, critic.lam_returns, critic.warmup_steps) == (0.05, 1.0, 50)
    assert vapo().imitation_coef == 0.1
