"""A policy that learns from a teacher of another width: the learner's pass against the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.learn.learner import Learner
from rlhf.learn.models import References
from rlhf.metrics import Mean, merge
from rlhf.models.heads import Head
from rlhf.models.loading import LAYOUTS
from rlhf.models.policy import Policy
from rlhf.models.pretrained import ModelError
from rlhf.types import Group
from tests.support import learner_of, policy_of, random_groups

Folder = Callable[[str], Path]


def distill(forward: float, **kl: Any):
    return ALGORITHMS["distill"](kl=KL(**{"coef": 1.0, "estimator": "exact", "forward": forward, **kl}))


def teacher_of(folder: Path) -> Policy:
    """A frozen model in float64 with a head that prefers some tokens."""
    teacher = policy_of(folder, dtype=torch.float64)
    with torch.no_grad():
        teacher.head.module.weight.mul_(20.0)
    teacher.freeze(torch.float64)
    return teacher


def plain(policy: Policy, teacher: Policy, groups: list[Group], forward: float) -> Tensor:
    """The loss from both models' own logits over one sequence at a time."""
    policy.layout = teacher.layout = "padded"
    parts: list[Tensor] = []
    for g in groups:
        for t in g.trajectories:
            ids, start = torch.tensor([g.prompt.token_ids + t.token_ids]), len(g.prompt.token_ids) - 1
            p = policy.model(input_ids=ids).logits[0, start:-1].log_softmax(-1)
            q = teacher.model(input_ids=ids).logits[0, start:-1].log_softmax(-1)
            kl = (1 - forward) * (p.exp() * (p - q)).sum(-1) + forward * (q.exp() * (q - p)).sum(-1)
            parts.append(kl[torch.tensor(t.loss_mask)])
    return torch.cat(parts).mean()


def gradients(policy: Policy) -> list[Tensor]:
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


def learned(learner: Learner, builder, groups: list[Group]) -> list[Tensor]:
    experience = builder.build(groups, kl_coef=1.0)
    everyone = list(range(len(groups)))
    learner.policy.model.zero_grad()
    counts = learner.counts(experience, everyone)
    metrics = merge(learner.accumulate(experience, everyone, counts, 1.0))
    assert metrics["kl/exact"].value > 0.1
    assert "loss/policy" not in metrics and "advantage/zero_fraction" not in learner.before(experience)
    return gradients(learner.policy)


@pytest.mark.parametrize("forward", [0.0, 0.4, 1.0])
def test_every_layout_and_microbatch_gives_the_gradient_of_the_plain_formula(
    tiny_model: Folder, forward: float
):
    policy = policy_of(tiny_model("llama"), dtype=torch.float64)
    teacher = teacher_of(tiny_model("llama-wide"))
    assert teacher.head.module.in_features == 2 * policy.head.module.in_features
    groups = random_groups(3, sizes=[3, 2])
    policy.model.zero_grad()
    plain(policy, teacher, groups, forward).backward()
    expected = gradients(policy)
    # whatever the policy's layout, the teacher has its own
    teacher.layout = "shared_prefix"
    for layout, budget in zip(LAYOUTS, (4096, 40, 30), strict=True):
        policy.layout = layout
        learner, builder = learner_of(policy, distill(forward), teacher, microbatch_tokens=budget)
        for got, want in zip(learned(learner, builder, groups), expected, strict=True):
            assert (got - want).abs().max() <= 1e-10 * max(1.0, float(want.abs().max()))


def test_groups_whose_rewards_are_all_equal_are_learned_from(tiny_model: Folder):
    policy = policy_of(tiny_model("llama"), dtype=torch.float64)
    learner, builder = learner_of(policy, distill(0.0), teacher_of(tiny_model("qwen2")))
    experience = builder.build(random_groups(1, sizes=[1, 1]), kl_coef=1.0)
    assert learner.update(experience, step=0, seed=0, kl_coef=1.0)["grad_norm"].value > 0


@pytest.mark.parametrize("kl", [{"forward": 0.3}, {"estimator": "k3", "forward": 0.0}], ids=["exact", "k3"])
def test_a_step_with_two_teachers_is_the_sum_of_a_part_with_each(tiny_model: Folder, kl: dict[str, Any]):
    policy = policy_of(tiny_model("llama"), dtype=torch.float64)
    teachers = {name: teacher_of(tiny_model(shape)) for name, shape in (("a", "llama-wide"), ("b", "qwen2"))}
    names = ["b", "a", "a", "b"]
    groups = [
        replace(g, prompt=replace(g.prompt, columns={"teacher": name}))
        for g, name in zip(random_groups(5, sizes=[2, 1, 3, 2]), names, strict=True)
    ]
    everyone, algorithm = list(range(4)), distill(**kl)
    kind = "kl/exact" if algorithm.needs_exact_kl else "kl/ref"
    for layout, budget in zip(LAYOUTS, (4096, 40, 30), strict=True):
        policy.layout = layout
        parts, kls = list[list[Tensor]](), dict[str, Mean]()
        for name, teacher in teachers.items():
            learner, builder = learner_of(policy, algorithm, teacher, microbatch_tokens=budget)
            experience = builder.build(groups, kl_coef=1.0)
            # the denominator is that of the whole step
            counts = learner.counts(experience, everyone)
            policy.model.zero_grad()
            own = [g for g in everyone if names[g] == name]
            found = merge(learner.accumulate(experience, own, counts, 1.0))[kind]
            assert isinstance(found, Mean)
            kls[name] = found
            parts.append(gradients(policy))
        several = References(teachers, "teacher")
        learner, builder = learner_of(policy, algorithm, several, microbatch_tokens=budget)
        experience = builder.build(groups, kl_coef=1.0)
        policy.model.zero_grad()
        metrics = merge(learner.accumulate(experience, everyone, counts, 1.0))
        for got, one, other in zip(gradients(policy), *parts, strict=True):
            assert (got - one - other).abs().max() <= 1e-10 * max(1.0, float(got.abs().max()))
        for name in teachers:
            assert metrics[f"{kind}/{name}"].value == pytest.approx(kls[name].value, rel=1e-12)
        # the loss of the step: the mean over the tokens of both
        assert metrics[kind].value == pytest.approx((kls["a"] + kls["b"]).value, rel=1e-10)
        assert abs(kls["a"].value - kls["b"].value) > 0.01


def head(rows: int, *, scale: float = 1.0, softcap: float | None = None, seed: int = 0) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Linear(6, rows, dtype=torch.float64)
    return Head(module, softcap, scale)


def test_a_teacher_with_another_scale_and_more_rows_gives_its_distribution_over_the_policys_tokens():
    policy, teacher = head(5, scale=0.5), head(8, scale=2.0, seed=1)
    hidden, targets = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 4, 2])
    stats = policy.statistics(
        hidden, targets, temperature=0.7, want=("kl", "ref_logprob"), **teacher.beside(policy, hidden)
    )
    assert stats.kl is not None and stats.ref_logprob is not None
    q = (2.0 * teacher.module(hidden)[:, :5] / 0.7).log_softmax(-1)
    p = (0.5 * policy.module(hidden) / 0.7).log_softmax(-1)
    torch.testing.assert_close(stats.ref_logprob, q.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(stats.kl, (p.exp() * (p - q)).sum(-1))


@pytest.mark.parametrize("teacher", [head(4), head(5, softcap=30.0)], ids=["rows", "cap"])
def test_a_teacher_of_another_vocabulary_or_cap_is_refused(teacher: Head):
    with pytest.raises(ModelError, match="their distributions cannot be compared"):
        teacher.beside(head(5), torch.zeros(1, 6, dtype=torch.float64))
