"""A preference loss by the learner: the same however a step is cut, and what the models say by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.preference.table import PREFERENCE, apo_zero, bco, dpo, kto
from rlhf.collect.pairing import Pairing
from rlhf.config.pairs import PairsConfig
from rlhf.learn.contrasts import under_other_prompts
from rlhf.learn.learner import Learner
from rlhf.metrics import merge
from rlhf.models.loading import LAYOUTS
from rlhf.models.packing import microbatches, pack
from rlhf.models.policy import Policy
from rlhf.types import Experience, Group
from tests.support import ALONE, group, learner_of, policy_of, random_groups

NLL = {"slic", "cpo", "rpo", "orpo"}


@cache
def exact_pair(folder: Path) -> tuple[Policy, Policy]:
    policy, reference = policy_of(folder, dtype=torch.float64), policy_of(folder, dtype=torch.float64)
    with torch.no_grad():
        reference.head.module.weight.mul_(1.2)
    return policy, reference


def paired(groups: list[Group], algorithm: Algorithm, rule: str = "best_worst") -> list[Group]:
    return Pairing(PairsConfig(rule=rule), algorithm)(groups)[0]


def gradients_of(learner: Learner, experience: Experience) -> tuple[float, list[Tensor]]:
    model = learner.policy.model
    model.zero_grad()
    groups = list(range(len(experience.prompts)))
    parts = learner.accumulate(experience, groups, learner.counts(experience, groups), 0.0)
    return merge(parts)["pairs/loss"].value, [
        p.grad.clone() for p in model.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("name", PREFERENCE)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(8, 120), order=st.randoms(use_true_random=False))
def test_microbatches_order_and_packing_change_neither_loss_nor_gradient(
    tiny_model_dir: Path, name: str, seed: int, budget: int, order
):
    policy, reference = exact_pair(tiny_model_dir)
    algorithm = PREFERENCE[name]()
    groups = paired(random_groups(seed, sizes=[3, 2, 5]), algorithm, "all")
    whole, builder = learner_of(policy, algorithm, reference)
    loss, expected = gradients_of(whole, builder.build(groups, kl_coef=0.0))

    # groups by other numbers would have other neighbours, whose completions are KTO's baseline
    shuffled = groups
    if name != "kto":
        shuffled = order.sample(groups, len(groups))
    cut, builder = learner_of(policy, algorithm, reference, microbatch_tokens=budget)
    experience = builder.build(shuffled, kl_coef=0.0)
    for layout in LAYOUTS:
        policy.layout = layout
        try:
            other_loss, gradients = gradients_of(cut, experience)
        finally:
            policy.layout = "shared_prefix"
        assert other_loss == pytest.approx(loss, abs=1e-6)
        for got, want in zip(gradients, expected, strict=True):
            assert (got - want).abs().max() <= 1e-10 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_microbatch_cuts_a_pair(tiny_model_dir: Path, layout):
    policy, reference = exact_pair(tiny_model_dir)
    _, builder = learner_of(policy, dpo(), reference)
    experience = builder.build(paired(random_groups(3, sizes=[2] * 6), dpo()), kl_coef=0.0)
    assert experience.contrasts is not None
    for budget in (1, 30, 60, 1000):
        micros = list(microbatches(experience, range(6), budget, layout=layout))
        found = [experience.contrasts.within(m.sequences) for m in micros]
        assert sum(len(c.target) for c in found) == 6
        assert [i for m in micros for i in experience.sequence[m.index].unique_consecutive().tolist()] == [
            i for m in micros for i in m.sequences.tolist()
        ]
        if budget == 1000:
            assert len(micros) == 1
        elif budget > 1:
            sizes = [len(m.packed.token_ids) for m in micros if len(m.packed.spans) > 1]
            assert all(size <= budget for size in sizes)


def test_where_the_policy_is_the_reference_the_margin_is_zero(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    learner, builder = learner_of(policy, dpo(), policy_of(tiny_model_dir))
    experience = builder.build(paired(random_groups(5, sizes=[2, 4, 3]), dpo()), kl_coef=0.0)
    counts = learner.counts(experience, [0, 1, 2])
    assert counts.comparisons == 3.0
    metrics = merge(learner.accumulate(experience, [0, 1, 2], counts, 0.0))
    assert metrics["pairs/margin"].value == 0.0
    assert metrics["pairs/loss"].value == pytest.approx(0.6931471805599453, abs=1e-7)
    assert metrics["pairs/accuracy"].value == 0.5
    # nothing is learned by advantages, and nothing is said of any
    assert not [name for name in metrics if name.startswith(("loss/", "ratio/", "kl/old"))]
    assert learner.before(experience) == {}


def test_a_step_learns_pairs_and_leaves_out_what_is_in_none(tiny_model_dir: Path):
    policy, reference = policy_of(tiny_model_dir), policy_of(tiny_model_dir)
    learner, builder = learner_of(policy, dpo(), reference)
    [one, alike, same] = random_groups(7, sizes=[4, 2, 2])
    alike = replace(alike, trajectories=tuple(replace(t, reward=1.0) for t in alike.trajectories))
    first = same.trajectories[0]
    same = replace(same, trajectories=(first, replace(first, reward=1.0)))
    groups, metrics = Pairing(PairsConfig(), dpo())([one, alike, same])
    assert [len(g.trajectories) for g in groups] == [2]
    assert metrics["pairs/groups"].value == 1.0
    assert metrics["pairs/tied"].value == pytest.approx(1 / 3)
    assert metrics["pairs/identical"].value == pytest.approx(1 / 3)
    experience = builder.build(groups, kl_coef=0.0)
    before = [p.detach().clone() for p in policy.model.parameters()]
    values = learner.update(experience, step=0, seed=0, kl_coef=0.0)
    assert values["grad_norm"].value > 0
    assert any((a != b).any() for a, b in zip(before, policy.model.parameters(), strict=True))


def logprobs(policy: Policy, groups: list[Group]) -> list[float]:
    """Of each completion, summed, each from a forward pass of its own."""
    found: list[float] = []
    for g in groups:
        for t in g.trajectories:
            packed = pack([torch.tensor(g.prompt.token_ids)], [[torch.tensor(t.token_ids)]])
            with torch.no_grad():
                statistics = policy.statistics(packed, temperature=1.0, want=("logprob",))
            assert statistics.logprob is not None
            found.append(float(statistics.logprob.sum()))
    return found


def test_ktos_baseline_is_the_log_ratio_of_other_prompts_completions(tiny_model_dir: Path):
    policy, reference = exact_pair(tiny_model_dir)
    groups = paired(random_groups(11, sizes=[2, 2, 2]), kto())
    others = [replace(groups[i], trajectories=groups[j].trajectories) for i, j in ((0, 1), (1, 2), (2, 0))]
    assert under_other_prompts(groups, [0, 1, 2], ALONE) == others
    # the weights differ so much that the mean is negative one way round and positive the other
    for own, other in ((policy, reference), (reference, policy)):
        _, builder = learner_of(own, kto(beta=0.2), other)
        experience = builder.build(groups, kl_coef=0.0)
        pairs = list(zip(logprobs(own, others), logprobs(other, others), strict=True))
        z0 = max(0.0, sum(a - b for a, b in pairs) / len(pairs))
        assert experience.contrasts is not None
        assert experience.contrasts.offset.tolist() == pytest.approx([0.2 * z0] * 6, abs=1e-6)


def test_kto_without_another_prompt_measures_from_zero(tiny_model_dir: Path):
    policy, reference = exact_pair(tiny_model_dir)
    _, builder = learner_of(policy, kto(), reference)
    experience = builder.build(paired(random_groups(1, sizes=[2]), kto()), kl_coef=0.0)
    assert experience.contrasts is not None and experience.contrasts.offset.tolist() == [0.0, 0.0]


def test_bcos_baseline_is_the_mean_of_all_steps_so_far(tiny_model_dir: Path):
    policy, reference = exact_pair(tiny_model_dir)
    _, builder = learner_of(policy, bco(beta=0.5), reference)
    steps = [paired(random_groups(seed, sizes=[2, 3]), bco()) for seed in (1, 2)]
    ratios: list[float] = []
    for groups in steps:
        experience = builder.build(groups, kl_coef=0.0)
        own, other = logprobs(policy, groups), logprobs(reference, groups)
        ratios += [a - b for a, b in zip(own, other, strict=True)]
        assert experience.contrasts is not None
        expected = 0.5 * sum(ratios) / len(ratios)
        assert experience.contrasts.offset.tolist() == pytest.approx([expected] * 4, abs=1e-5)
    # a run that is resumed goes on with the same mean
    assert builder.running_reward is not None
    _, again = learner_of(policy, bco(beta=0.5), reference)
    assert again.running_reward is not None
    again.running_reward.load(builder.running_reward.state(), {})
    assert again.running_reward.moments == builder.running_reward.moments


def test_single_labels_are_learned_without_a_partner(tiny_model_dir: Path):
    policy, reference = exact_pair(tiny_model_dir)
    algorithm = apo_zero()
    groups = paired([group("a", [5, 6], [[7, 8]], [1.0]), group("b", [5], [[9]], [0.0])], algorithm)
    learner, builder = learner_of(policy, algorithm, reference)
    experience = builder.build(groups, kl_coef=0.0)
    counts = learner.counts(experience, [0, 1])
    assert counts.comparisons == 2.0
    [good, bad] = [a - b for a, b in zip(logprobs(policy, groups), logprobs(reference, groups), strict=True)]
    sigmoid = torch.tensor([-0.1 * good, 0.1 * bad], dtype=torch.float64).sigmoid()
    metrics = merge(learner.accumulate(experience, [0, 1], counts, 0.0))
    assert metrics["pairs/loss"].value == pytest.approx(float(sigmoid.mean()), abs=1e-7)
    # a method on pairs has no use for them
    assert paired(groups, dpo()) == []
