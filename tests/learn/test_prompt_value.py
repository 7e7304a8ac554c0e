"""The value of a prompt: padding has no part in it, it is learned from rewards, and it stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.config.data import PromptValueConfig
from rlhf.learn.prompt_value import PromptValues, ValueHead, fit, padded_states, prompt_states
from rlhf.models.policy import Policy
from rlhf.types import Prompt
from tests.support import ALONE, policy_of

SECTION = PromptValueConfig(lr=1e-2, epochs=40)
PROMPTS = [Prompt(f"p{i}", tuple(3 + (7 * i + k) % 90 for k in range(2 + i % 5)), "") for i in range(24)]


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return policy_of(tiny_model_dir)


def head(**settings: float) -> ValueHead:
    torch.manual_seed(0)
    return ValueHead(32, max_value=settings.get("max_value", 1.0)).eval()


def test_states_are_those_of_the_models_own_forward(policy: Policy, tiny_model_dir: Path):
    assert policy.layout == "shared_prefix"
    got, model = prompt_states(policy, PROMPTS[:6]), policy_of(tiny_model_dir, packing="padded").model
    for prompt, states in zip(PROMPTS, got, strict=False):
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_padding_has_no_part_in_a_value_not_even_nan():
    states = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (2, 7, 4)]
    model = head()
    alone = torch.cat([model(*padded_states([s])) for s in states])
    padded, mask = padded_states(states)
    torch.testing.assert_close(model(padded, mask), alone)
    torch.testing.assert_close(model(padded.masked_fill(~mask[..., None], torch.nan), mask), alone)
    loss = model(padded.masked_fill(~mask[..., None], torch.nan), mask).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_every_token_of_a_prompt_has_a_part_in_it():
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    model, mask = head(), torch.ones(1, 5, dtype=torch.bool)
    for token in range(5):
        other = states.clone()
        other[0, token] += 1.0
        assert model(other, mask).item() != model(states, mask).item()


def test_values_lie_between_zero_and_the_largest():
    states = 100 * torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(0))
    values = head(max_value=3.0)(states, torch.ones(50, 3, dtype=torch.bool))
    assert values.min() >= 0
    assert 1.0 < values.max() <= 3.0


def targets(prompts: Sequence[Prompt]) -> list[float | None]:
    """What the first token says; one prompt has no reward."""
    return [None if p.id == "p3" else (p.token_ids[0] % 2) * 0.6 + 0.2 for p in prompts]


def test_a_head_learns_more_than_a_constant_and_the_best_epoch_is_kept(policy: Policy):
    states = prompt_states(policy, PROMPTS)
    wanted = torch.tensor([t or 0.0 for t in targets(PROMPTS)])

    def fitted(epochs: int) -> tuple[float, Tensor]:
        model, section = head(), SECTION.model_copy(update={"epochs": epochs})
        error = fit(model, states, lambda values, at: (values - wanted[at]).square(), section, seed=1)
        with torch.no_grad():
            return error, model(*padded_states(states))

    short, long, constant = fitted(5), fitted(40), wanted.var(correction=0)
    assert long[0] < 0.5 * constant
    assert long[0] <= short[0]
    assert (long[1] - wanted).square().mean() < 0.5 * constant
    # the draws of dropout and the order depend on the seed alone
    torch.rand(3)
    assert torch.equal(long[1], fitted(40)[1])


def test_values_are_learned_once_and_come_back_from_a_checkpoint(policy: Policy):
    values = PromptValues(SECTION, policy, PROMPTS, targets, ALONE, seed=0)
    said = values.prepare()
    assert "learned from 23 rewards" in said
    assert values.values.keys() == {p.id for p in PROMPTS}
    again = PromptValues(SECTION, policy, PROMPTS, targets, ALONE, seed=0)
    again.load(values.state(), {})
    assert "those of the checkpoint" in again.prepare()
    assert again.values == values.values


@pytest.mark.parametrize(("lr", "warns"), [(1e3, True), (1e-4, False)])
def test_values_further_from_the_rewards_than_their_mean_are_called_bad(
    policy: Policy, caplog: pytest.LogCaptureFixture, lr: float, warns: bool
):
    section = PromptValueConfig(lr=lr, epochs=2)
    rewards: list[float | None] = [float(i % 2) for i in range(len(PROMPTS))]
    PromptValues(section, policy, PROMPTS, lambda p: rewards, ALONE, seed=0).prepare()
    assert ("lower prompt_value.lr" in caplog.text) == warns


@pytest.mark.parametrize(("reward", "message"), [(1.2, "raise it, or shift"), (-0.1, "rewards go from -0.1")])
def test_rewards_that_no_value_can_reach_are_refused(policy: Policy, reward: float, message: str):
    values = PromptValues(SECTION, policy, PROMPTS, lambda p: [reward] * len(p), ALONE, seed=0)
    with pytest.raises(ValueError, match=message):
        values.prepare()


def test_no_reward_at_all_is_refused(policy: Policy):
    values = PromptValues(SECTION, policy, PROMPTS, lambda p: [None] * len(p), ALONE, seed=0)
    with pytest.raises(ValueError, match="no prompt has a reward"):
        values.prepare()
