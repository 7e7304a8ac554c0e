"""The critic beside the policy: same numbers however work is cut, its own optimizer, one gradient norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.algos.algorithm import KL
from rlhf.algos.critic import CriticLoss, RewardScaling
from rlhf.algos.table import ppo, ppo_max, vapo
from rlhf.config.learner import LearnerConfig
from rlhf.learn.buffer import Buffer
from rlhf.learn.critic import Critic, Warmup
from rlhf.learn.learner import Learner
from rlhf.metrics import ExpMean, Mean, merge
from rlhf.models.loading import LAYOUTS, load_trunk
from rlhf.models.packing import pack
from rlhf.models.pretrained import ModelError
from rlhf.types import Experience, Group
from tests.support import ALONE, learner_of, policy_of, random_groups, trajectory

SECTION = LearnerConfig(lr=1e-2, microbatch_tokens=4096)
PLAIN = ppo(kl=KL(), whiten=False)


def parameters(learner: Learner) -> Iterator[nn.Parameter]:
    assert learner.critic is not None
    yield from learner.policy.model.parameters()
    yield from learner.critic.head.parameters()
    if learner.critic.own:
        yield from learner.critic.trunk.model.parameters()


def gradients_of(learner: Learner, experience: Experience) -> tuple[list[float], list[Tensor]]:
    for p in parameters(learner):
        p.grad = None
    groups = list(range(len(experience.prompts)))
    metrics = merge(learner.accumulate(experience, groups, learner.counts(experience, groups), 0.0))
    losses = [metrics[name].value for name in ("loss/policy", "critic/loss", "perplexity")]
    return losses, [p.grad.clone() for p in parameters(learner) if p.grad is not None]


@pytest.mark.parametrize("trunk", ["own", "policy"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(8, 120), order=st.randoms(use_true_random=False))
def test_microbatches_order_and_packing_change_neither_losses_nor_gradients(
    tiny_model_dir: Path, trunk: str, seed: int, budget: int, order
):
    policy = policy_of(tiny_model_dir, dtype=torch.float64)
    algorithm = vapo(critic=CriticLoss(lam_returns=1.0))
    if trunk == "own":
        learner, builder = learner_of(policy, algorithm, critic_trunk=tiny_model_dir, lr=1e-2)
    else:
        learner, builder = learner_of(policy, algorithm)
    assert learner.critic is not None
    learner.critic.head.double()
    with torch.no_grad():
        learner.critic.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    groups = random_groups(seed, sizes=[3, 2, 5])
    losses, expected = gradients_of(learner, builder.build(groups, kl_coef=0.0))
    shuffled: list[Group] = [
        replace(g, trajectories=tuple(order.sample(g.trajectories, len(g.trajectories)))) for g in groups
    ]
    order.shuffle(shuffled)
    learner.section = learner.section.model_copy(update={"microbatch_tokens": budget})
    experience = builder.build(shuffled, kl_coef=0.0)
    for layout in LAYOUTS:
        policy.layout = learner.critic.trunk.layout = layout
        other, gradients = gradients_of(learner, experience)
        assert other == pytest.approx(losses, rel=1e-6, abs=1e-7)
        for got, want in zip(gradients, expected, strict=True):
            # advantages and returns are float32
            assert (got - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))


def test_a_value_is_the_head_on_the_state_before_the_token(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    critic = Critic.on_policy_trunk(policy, SECTION, 10)
    nn.init.normal_(critic.head.weight)
    prompt, completion = torch.tensor([5, 6, 7]), torch.tensor([8, 9])
    values = critic.values(pack([prompt], [[completion, completion[:1]]]), None)
    policy.layout = "padded"
    states = policy.model.base_model(torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state[0]
    wanted = (states @ critic.head.weight[0])[[2, 3, 2]]
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)


def test_the_two_trunks_give_the_same_values_and_only_a_shared_one_is_trained_by_them(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    own = Critic.on_own_trunk(str(tiny_model_dir), ALONE.device, torch.float32, SECTION, 10)
    shared = Critic.on_policy_trunk(policy, SECTION, 10)
    assert not own.head.weight.any() and not shared.head.weight.any()
    for critic in (own, shared):
        nn.init.constant_(critic.head.weight, 0.1)
    packed = pack([torch.tensor([5, 6])], [[torch.tensor([7, 8, 9])]])
    hidden = policy.hidden(packed)
    values = [critic.values(packed, hidden) for critic in (own, shared)]
    torch.testing.assert_close(*values)
    values[0].sum().backward()
    assert all(p.grad is None for p in policy.model.parameters())
    values[1].sum().backward()
    assert policy.model.get_input_embeddings().get_parameter("weight").grad is not None


def test_a_critic_starts_from_a_reward_model_with_its_head(tiny_model_dir: Path, tmp_path: Path):
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    reward_model.save_pretrained(tmp_path / "one")
    critic = Critic.on_own_trunk(str(tmp_path / "one"), ALONE.device, torch.float32, SECTION, 10)
    assert critic.head.weight.any()
    ids = torch.tensor([[5, 6, 7, 8]])
    want = reward_model(input_ids=ids).logits[0, 0]
    # the value before a fifth token is the score after the fourth
    got = critic.values(pack([ids[0, :2]], [[torch.tensor([7, 8, 9])]]), None)[-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    with pytest.raises(ModelError, match="gives 3 scores"):
        Critic.on_own_trunk(str(tmp_path / "three"), ALONE.device, torch.float32, SECTION, 10)


def test_a_trunk_that_cannot_share_prompts_gets_padded_rows(tiny_model, caplog: pytest.LogCaptureFixture):
    trunk, weight = load_trunk(str(tiny_model("gemma2")), ALONE.device)
    assert trunk.layout != "shared_prefix" and weight is None
    assert "prompts are not shared" in caplog.text


def test_policy_and_critic_are_clipped_by_one_norm_and_keep_their_own_rates(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    learner, builder = learner_of(policy, PLAIN, critic_trunk=tiny_model_dir, lr=1e-2, max_grad_norm=1e-3)
    assert learner.critic is not None
    learner.critic.optimizer.section = learner.section.model_copy(update={"lr": 5e-3})
    experience = builder.build(random_groups(1, sizes=[4, 4]), kl_coef=0.0)
    _, gradients = gradients_of(learner, experience)
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    metrics = learner.update(experience, step=0, seed=0, kl_coef=0.0)
    assert metrics["grad_norm"].value == pytest.approx(2 * norm, rel=0.5)
    assert (metrics["lr"].value, metrics["critic/lr"].value) == (1e-2, 5e-3)


def test_while_the_critic_warms_up_the_policy_is_frozen_and_its_schedule_waits(
    tiny_model_dir: Path,
):
    algorithm = replace(PLAIN, critic=CriticLoss(warmup_steps=2))
    section = {"lr": 1e-2, "warmup_steps": 4}
    for learner, builder in (
        learner_of(policy_of(tiny_model_dir), algorithm, critic_trunk=tiny_model_dir, **section),
        learner_of(policy_of(tiny_model_dir), algorithm, warmup_steps=4),
    ):
        assert learner.critic is not None
        experience = builder.build(random_groups(1, sizes=[4, 4]), kl_coef=0.0)
        for step, frozen in enumerate((True, True, False)):
            before = [p.clone() for p in learner.policy.model.parameters()]
            head = learner.critic.head.weight.clone()
            metrics = learner.update(experience, step=step, seed=0, kl_coef=0.0)
            after = learner.policy.model.parameters()
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert all(same) if frozen else not any(same)
            assert not torch.equal(head, learner.critic.head.weight)
            assert ("loss/policy" in metrics) != frozen
            assert learner.warmup.adapt(metrics)["critic/warmup"].value == float(frozen)
        assert metrics["lr"].value == pytest.approx(learner.section.lr / 4)


def test_a_schedule_that_begins_after_the_warmup_ends_with_the_run_all_the_same(tiny_model_dir: Path):
    learner, builder = learner_of(
        policy_of(tiny_model_dir), replace(PLAIN, critic=CriticLoss(warmup_steps=2)), schedule="linear"
    )
    experience = builder.build(random_groups(1, sizes=[4]), kl_coef=0.0)
    learner.warmup.load({"steps": 2, "over": True}, {})
    # of 10 steps it learns in 8, of which this is the last
    last = learner.update(experience, step=9, seed=0, kl_coef=0.0)["lr"].value
    assert last == pytest.approx(learner.section.lr / 8)


def test_a_critic_that_is_good_enough_ends_its_warmup():
    warmup = Warmup(CriticLoss(warmup_steps=5, warmup_explained_variance=0.5))
    seen = [0.1, 0.6, 0.2]
    flags = [
        warmup.adapt({"critic/explained_variance": Mean(share)})["critic/warmup"].value for share in seen
    ]
    assert flags == [1.0, 1.0, 0.0] and warmup.over
    other = Warmup(CriticLoss(warmup_steps=5, warmup_explained_variance=0.5))
    other.load(warmup.state(), {})
    assert (other.steps, other.over) == (2, True)
    unknown = Warmup(CriticLoss(warmup_steps=2, warmup_explained_variance=0.5))
    unknown.adapt({})
    assert not unknown.over
    unknown.adapt({})
    assert unknown.over


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_a_critic_learns_the_rewards_of_its_completions(tiny_model_dir: Path, trunk: str):
    algorithm = replace(PLAIN, critic=CriticLoss(warmup_steps=60, lam=1.0, value_clip=None))
    groups = random_groups(3, sizes=[2] * 6)
    if trunk == "own":
        learner, builder = learner_of(
            policy_of(tiny_model_dir), algorithm, critic_trunk=tiny_model_dir, lr=1e-2
        )
    else:
        learner, builder = learner_of(policy_of(tiny_model_dir), algorithm, lr=3e-2)
    shares: list[float] = []
    for step in range(60):
        metrics = learner.update(builder.build(groups, kl_coef=0.0), step=step, seed=0, kl_coef=0.0)
        shares.append(metrics["critic/explained_variance"].value)
    assert shares[0] == pytest.approx(0.0, abs=1e-6)
    # under a frozen trunk of random weights a linear head can tell little apart
    assert shares[-1] > (0.5 if trunk == "own" else 0.15), shares[::10]


def test_rewards_are_scaled_after_their_own_step_is_known_and_the_memory_is_saved(tiny_model_dir: Path):
    algorithm = ppo_max(kl=KL(), reward_scaling=RewardScaling(center=True, scale=True, clip=0.8))
    _, builder = learner_of(policy_of(tiny_model_dir), algorithm)
    prompt = random_groups(0, sizes=[1])[0]

    def returns(*rewards: float) -> list[float]:
        group = replace(prompt, trajectories=tuple(trajectory([5], reward) for reward in rewards))
        experience = builder.build([group], kl_coef=0.0)
        assert experience.critic is not None
        return experience.critic.returns.tolist()

    returns(1.0, 2.0, 3.0, 4.0)
    saved = builder.scaler.state()
    assert returns(5.0, 7.0) == pytest.approx([0.617213, 0.8], abs=1e-6)
    builder.scaler.load(saved, {})
    assert returns(5.0, 7.0) == pytest.approx([0.617213, 0.8], abs=1e-6)


def test_a_buffer_comes_back_from_a_checkpoint_as_it_was(tiny_model_dir: Path):
    learner, builder = learner_of(policy_of(tiny_model_dir), vapo(), minibatches=2)
    experience = builder.build(random_groups(5, sizes=[2, 3]), kl_coef=0.0)
    buffer, other = Buffer(), Buffer()
    buffer.fill(experience, learner.before(experience) | {"perplexity": ExpMean(1.5, 3.0)})
    buffer.advance({"grad_norm": Mean(0.5)})
    other.load(buffer.state(), buffer.tensors())
    assert (other.updates, other.metrics) == (1, buffer.metrics)
    assert str(other.experience) == str(experience)
    buffer.empty()
    other.load(buffer.state(), buffer.tensors())
    assert other.experience is None and other.metrics == {}


def test_right_completions_are_imitated_and_counted_over_the_whole_update(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    plain, builder = learner_of(policy, vapo(imitation_coef=0.0, critic=CriticLoss()))
    mixed, with_right = learner_of(policy, vapo(imitation_coef=0.1, critic=CriticLoss()))
    groups = random_groups(7, sizes=[3, 2])
    _, without = gradients_of(plain, builder.build(groups, kl_coef=0.0))
    experience = with_right.build(groups, kl_coef=0.0)
    assert experience.correct is not None and experience.correct.tolist() == [False, True, False, False, True]
    _, gradients = gradients_of(mixed, experience)
    policy.model.zero_grad()
    likelihood: list[Tensor] = []
    for g in groups:
        ids = [torch.tensor(t.token_ids) for t in g.trajectories if t.reward == 1.0]
        packed = pack([torch.tensor(g.prompt.token_ids)], [ids])
        logprob = policy.statistics(packed, temperature=1.0, want=("logprob",)).logprob
        assert logprob is not None
        likelihood.append(logprob)
    (-0.1 * torch.cat(likelihood).mean()).backward()
    imitation = [p.grad for p in policy.model.parameters() if p.grad is not None]
    for got, want, base in zip(gradients, imitation, without, strict=False):
        torch.testing.assert_close(got - base, want, rtol=1e-3, atol=1e-5)


def test_the_policy_of_a_causal_model_is_untouched_by_a_critics_loading(tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trunk, _ = load_trunk(str(tiny_model_dir), ALONE.device)
    mine = dict(trunk.model.named_parameters())
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, mine[name]), name
