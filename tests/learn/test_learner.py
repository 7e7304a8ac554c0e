"""The same loss, gradient and update however a step is cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.config.learner import LearnerConfig
from rlhf.learn.learner import Learner
from rlhf.learn.optimizer import MasterAdamW, lr_factor
from rlhf.metrics import merge
from rlhf.models.loading import LAYOUTS
from rlhf.types import Experience, Group
from tests.support import ALONE, learner_of, make_exact, policy_of, random_groups, trajectory

KINDS = {
    "grpo": {"kl": KL(coef=0.04)},
    "dapo": {"max_tokens": 64},
    "gspo": {},
    "dr_grpo": {"max_tokens": 64, "kl": KL(coef=0.1, estimator="exact")},
}


@cache
def exact_pair(folder: Path):
    policy, reference = policy_of(folder, dtype=torch.float64), policy_of(folder, dtype=torch.float64)
    with torch.no_grad():
        reference.head.module.weight.mul_(1.2)
    return policy, reference


def gradients_of(learner: Learner, experience: Experience) -> tuple[float, list[Tensor]]:
    model = learner.policy.model
    model.zero_grad()
    groups = list(range(len(experience.prompts)))
    parts = learner.accumulate(experience, groups, learner.counts(experience, groups), 0.04)
    loss = merge(parts)["loss/policy"].value
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(8, 120), order=st.randoms(use_true_random=False))
def test_microbatches_order_and_packing_change_neither_loss_nor_gradient(
    tiny_model_dir: Path, kind: str, seed: int, budget: int, order
):
    policy, reference = exact_pair(tiny_model_dir)
    algorithm = ALGORITHMS[kind](**KINDS[kind])
    groups = random_groups(seed, sizes=[3, 2, 5])
    whole, builder = learner_of(policy, algorithm, reference)
    loss, expected = gradients_of(whole, builder.build(groups, kl_coef=0.04))

    shuffled: list[Group] = [
        replace(g, trajectories=tuple(order.sample(g.trajectories, len(g.trajectories)))) for g in groups
    ]
    order.shuffle(shuffled)
    cut, builder = learner_of(policy, algorithm, reference, microbatch_tokens=budget)
    experience = builder.build(shuffled, kl_coef=0.04)
    for layout in LAYOUTS:
        policy.layout = layout
        try:
            other_loss, gradients = gradients_of(cut, experience)
        finally:
            policy.layout = "shared_prefix"
        assert other_loss == pytest.approx(loss, abs=1e-7)
        for got, want in zip(gradients, expected, strict=True):
            assert (got - want).abs().max() <= 1e-10 * max(1.0, float(want.abs().max()))


def test_groups_without_signal_skip_the_forward_and_still_count(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    algorithm = ALGORITHMS["dapo"](max_tokens=64)
    learner, builder = learner_of(policy, algorithm)
    told, silent = random_groups(1, sizes=[4, 4])
    silent = replace(silent, trajectories=tuple(replace(t, reward=1.0) for t in silent.trajectories))
    experience = builder.build([told, silent], kl_coef=0.0)
    groups = [0, 1]
    counts = learner.counts(experience, groups)
    assert counts.tokens == len(experience.token_ids)
    parts = learner.accumulate(experience, groups, counts, 0.0)
    both = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
    policy.model.zero_grad()
    learner.accumulate(experience, [0], counts, 0.0)
    for got, want in zip((p.grad for p in policy.model.parameters()), both, strict=True):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    metrics = learner.update(experience, step=0, seed=0, kl_coef=0.0)
    assert metrics["advantage/zero_fraction"].value == 0.5
    assert metrics["loss/policy"].value == pytest.approx(merge(parts)["loss/policy"].value)


def test_which_groups_have_a_signal_is_asked_of_the_device_at_once(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    learner, builder = learner_of(policy, ALGORITHMS["dapo"](max_tokens=64))
    told, silent, masked, last = random_groups(1, sizes=[4, 4, 4, 4])
    silent = replace(silent, trajectories=tuple(replace(t, reward=1.0) for t in silent.trajectories))
    nothing = [replace(t, loss_mask=(False,) * len(t.token_ids)) for t in masked.trajectories]
    masked = replace(masked, trajectories=tuple(nothing))
    experience = builder.build([told, silent, masked, last], kl_coef=0.0)
    with torch.profiler.profile() as profile:
        learned, skipped = learner._with_signal(experience, [3, 0, 1, 2], 0.0)
        assert learned == [3, 0]
        assert skipped == sum(sum(t.loss_mask) for t in silent.trajectories)
        # a KL in the loss teaches wherever there is a token
        assert learner._with_signal(experience, [3, 1, 2], 0.1) == ([3, 1], 0)
    assert "aten::item" not in {event.name for event in profile.events() or ()}


def test_without_any_signal_nothing_moves_and_it_is_counted(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    learner, builder = learner_of(policy, ALGORITHMS["grpo"](kl=KL()))
    same = tuple(trajectory([5, 6], 1.0) for _ in range(3))
    experience = builder.build(
        [replace(g, trajectories=same) for g in random_groups(1, sizes=[2])], kl_coef=0.0
    )
    before = [p.clone() for p in policy.model.parameters()]
    metrics = learner.update(experience, step=0, seed=0, kl_coef=0.0)
    assert metrics["update/no_signal"].value == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_several_updates_a_step_use_the_logprobs_from_before_the_first(tiny_model_dir: Path):
    learner, builder = learner_of(
        policy_of(tiny_model_dir), ALGORITHMS["grpo"](kl=KL()), epochs=3, minibatches=2, lr=1e-2
    )
    experience = builder.build(random_groups(2, sizes=[4, 4, 4]), kl_coef=0.0)
    assert experience.old_logprobs is not None
    metrics = learner.update(experience, step=0, seed=0, kl_coef=0.0)
    assert metrics["ratio/max"].value > 1.01


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    learner, builder = learner_of(policy, ALGORITHMS["grpo"](kl=KL()))
    experience = builder.build(random_groups(2, sizes=[4]), kl_coef=0.0)
    before = [p.clone() for p in policy.model.parameters()]
    broken = replace(experience, advantages=experience.advantages * float("inf"))
    metrics = learner.update(broken, step=0, seed=0, kl_coef=0.0)
    assert metrics["update/skipped"].value == 1 and "grad_norm" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_masters_keep_the_updates_that_bfloat16_rounds_away(tiny_model_dir: Path):
    section = LearnerConfig(lr=1e-6)
    policy = policy_of(tiny_model_dir)
    optimizer = MasterAdamW(policy.model, torch.bfloat16, section, total_steps=200)
    weights = {p.dtype for p in policy.model.parameters()}
    assert weights == {torch.bfloat16}
    masters = optimizer.masters.values()
    start = [m.value() for m in masters]
    for step in range(3):
        for master in masters:
            (master.weight.float().sum() * 1e-3).backward()
        optimizer.step(step, ALONE)
    moved = [(m.value() - s).abs().max().item() for m, s in zip(masters, start, strict=True)]
    assert all(2e-6 < m < 4e-6 for m in moved)
    for master in masters:
        assert torch.equal(master.weight, master.value().bfloat16())


def all_equal(one: MasterAdamW, other: MasterAdamW) -> bool:
    pairs = zip(one.masters.values(), other.masters.values(), strict=True)
    return all(torch.equal(a.value(), b.value()) for a, b in pairs)


def test_gradients_of_one_microbatch_stay_in_16_bits_and_more_are_added_up_in_float32(tiny_model_dir: Path):
    def optimizer() -> MasterAdamW:
        model = policy_of(tiny_model_dir).model
        return MasterAdamW(model, torch.bfloat16, LearnerConfig(max_grad_norm=1e9, lr=1e-3), 10)

    one, other = (optimizer() for _ in range(2))
    for count in (1, 3):
        for i in range(count):
            for k, master in enumerate(one.masters.values()):
                (master.weight.float() * (1 + 2**-7 * i) * (k + 1)).sum().backward()
        assert all(master.weight.grad is None for master in one.masters.values())
        added = {master.gradient.dtype for master in one.masters.values() if master.gradient is not None}
        assert added == {torch.bfloat16 if count == 1 else torch.float32}
        for k, master in enumerate(other.masters.values()):
            parts = [torch.full(master.shape, (1 + 2**-7 * i) * (k + 1)).bfloat16() for i in range(count)]
            master.gradient = torch.stack(parts).sum(0, dtype=torch.float32)
        norms = [o.step(0, ALONE)["grad_norm"].value for o in (one, other)]
        assert norms[0] == norms[1]
        assert all_equal(one, other)


def optimizer_of(folder: Path) -> MasterAdamW:
    return MasterAdamW(policy_of(folder).model, torch.bfloat16, LearnerConfig(lr=1e-3), 10)


def advance(optimizer: MasterAdamW, step: int) -> None:
    for i, master in enumerate(optimizer.masters.values()):
        (master.weight.float().square().sum() * (i + 1)).backward()
    optimizer.step(step, ALONE)


def test_optimizer_state_comes_back_bit_for_bit(tiny_model_dir: Path):
    one, other = (optimizer_of(tiny_model_dir) for _ in range(2))
    advance(one, 0)
    other.load(one.state(), one.tensors())
    advance(one, 1)
    advance(other, 1)
    assert all_equal(one, other)


def test_a_checkpoint_without_moments_is_one_of_masters_that_were_not_updated(tiny_model_dir: Path):
    """Earlier versions made moments with the first update."""
    one, other = (optimizer_of(tiny_model_dir) for _ in range(2))
    for master in one.masters.values():
        master.set(master.value() * 1.1)
    assert not all_equal(one, other)
    other.load(one.state(), {"model": one.tensors()["model"], "optimizer": {}})
    for step in range(2):
        advance(one, step)
        advance(other, step)
        assert all_equal(one, other)


def test_schedules_by_hand():
    def at(step: int, schedule: str, warmup: int = 0, share: float = 0.0) -> float:
        given = {"schedule": schedule, "warmup_steps": warmup, "final_lr_share": share}
        section = LearnerConfig.model_validate(given)
        return lr_factor(step, section, 100)

    assert [at(s, "constant", 4) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert at(50, "linear") == 0.5
    assert at(50, "cosine") == pytest.approx(0.5)
    assert at(100, "linear") == 0.0 and at(100, "cosine") == pytest.approx(0.0)
    # half-way between 1 and 0.2, and at the end 0.2
    assert [at(step, "linear", share=0.2) for step in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])
    assert [at(step, "cosine", share=0.2) for step in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])
    paper = {0: 0.1, 50: 0.1, 100: 0.2, 499: 0.998, 500: 1.0, 2000: 0.5, 5000: 0.316228}
    assert [at(step, "inverse_sqrt", 500) for step in paper] == pytest.approx([*paper.values()], abs=1e-6)
    assert at(0, "inverse_sqrt") == at(1, "inverse_sqrt") == 1.0


def test_float64_is_kept_where_a_model_has_it(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    make_exact(policy.model)
    optimizer = MasterAdamW(policy.model, torch.float64, LearnerConfig(), 1)
    for master in optimizer.masters.values():
        assert master.weight.dtype == master.value().dtype == torch.float64
        assert master.value().data_ptr() == master.weight.data_ptr()
