"""Trajectories of several turns in the learner: what a tool said is read, and nothing is learned from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algos.algorithm import KL, Algorithm, Mismatch
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.algos.table import ALGORITHMS
from rlhf.collect.pairing import Pairing
from rlhf.collect.sampler import length_metrics
from rlhf.config.learner import LearnerConfig
from rlhf.config.pairs import PairsConfig
from rlhf.distributed.world import World
from rlhf.kernels.token_stats import IGNORED, TokenStats
from rlhf.learn.critic import Critic
from rlhf.learn.experience import AdvantageContext, ExperienceBuilder
from rlhf.learn.learner import Learner
from rlhf.learn.models import Models
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import merge
from rlhf.models import heads
from rlhf.models.loading import LAYOUTS
from rlhf.models.packing import microbatches
from rlhf.models.policy import Policy
from rlhf.rewards.workers.pool import RewardError
from rlhf.tensors.candidates import Candidates
from rlhf.torch_typed import integers
from rlhf.types import CriticTargets, Experience, FinishReason, Group, Prompt, Trajectory
from tests.support import ALONE, policy_of, trajectory

REQUIRED: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_tokens": 16},
    "dapo": {"max_tokens": 16},
    "cispo": {"max_tokens": 16, "clip_high": 0.28},
    "dtpo": {"tool_objectives": ("short",)},
}
# a a | t t t | b b, and so on: 1 where the policy chose the token
MASKS = ("1100011", "1", "1011", "110010001")


def episode(mask: str, reward: float, start: int) -> Trajectory:
    """An episode with this loss mask; a turn begins with each 1 behind a 0, a step ends at first."""
    chosen = tuple(c == "1" for c in mask)
    turns = [0]
    for before, now in pairwise(chosen):
        turns.append(turns[-1] + (now and not before))
    stated = tuple(-4.0 - 0.1 * (start + i) if c else 0.0 for i, c in enumerate(chosen))
    return trajectory(
        [start + 5 * i for i in range(len(mask))],
        reward,
        loss_mask=chosen,
        turns=tuple(turns),
        rollout_logprobs=stated,
        objectives={"right": reward, "short": reward / 2},
        step_rewards=((0, reward / 2 - 0.1 * (start % 3)),),
    )


def episodes() -> list[Group]:
    one = [episode(mask, float(i % 2), 3 + 7 * i) for i, mask in enumerate(MASKS)]
    two = [episode(mask, float(i), 40 + 9 * i) for i, mask in enumerate(MASKS[:2])]
    return [Group(Prompt("p", (8, 9, 10), "p"), tuple(one)), Group(Prompt("q", (50,), "q"), tuple(two))]


def with_garbage(groups: list[Group]) -> list[Group]:
    """The same, where the log-probs of what a tool said are no numbers."""

    def spoiled(t: Trajectory) -> Trajectory:
        assert t.rollout_logprobs is not None
        pairs = zip(t.rollout_logprobs, t.loss_mask, strict=True)
        return replace(t, rollout_logprobs=tuple(p if chosen else float("nan") for p, chosen in pairs))

    return [replace(g, trajectories=tuple(map(spoiled, g.trajectories))) for g in groups]


@cache
def exact_pair(folder: Path) -> tuple[Policy, Policy]:
    policy, reference = policy_of(folder, dtype=torch.float64), policy_of(folder, dtype=torch.float64)
    with torch.no_grad():
        reference.head.module.weight.mul_(1.2)
    return policy, reference


def parts(folder: Path, algorithm: Algorithm, **section: Any) -> tuple[Learner, ExperienceBuilder]:
    """A learner in float64, and a builder that knows everything that some algorithm asks for."""
    policy, reference = exact_pair(folder)
    settings = LearnerConfig.model_validate({"microbatch_tokens": 4096, **section})
    critic = None
    if algorithm.critic is not None:
        critic = Critic.on_policy_trunk(policy, settings, total_steps=10)
        critic.head.double()
        with torch.no_grad():
            critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    models = Models(algorithm=algorithm, policy=policy, reference=reference, iterate=reference, critic=critic)
    by_prompt = {"p": 0.3, "q": 0.6}
    context = AdvantageContext(
        prompt_values=by_prompt, temperature_factors=by_prompt, is_correct=lambda t: t.reward == 1.0
    )
    optimizer = MasterAdamW(policy.model, torch.float64, settings, total_steps=10)
    learner = Learner(models, optimizer, ALONE, settings, temperature=1.0)
    learner.warmup.over = True
    return learner, ExperienceBuilder(models, ALONE, settings, context, temperature=1.0)


def built(folder: Path, algorithm: Algorithm, groups: list[Group]) -> tuple[Learner, Experience]:
    """With two epochs, so that there are log-probs from before the first update."""
    learner, builder = parts(folder, algorithm, epochs=2)
    if algorithm.preference is not None:
        groups, _ = Pairing(PairsConfig(rule="all"), algorithm)(groups)
    return learner, builder.build(groups, kl_coef=0.04)


def learned(
    learner: Learner, experience: Experience, weights: Sequence[Tensor] = ()
) -> tuple[dict[str, float], list[Tensor]]:
    """The metrics of one update over all groups, its losses among them, and its gradients."""
    weights = [*weights, *learner.policy.model.parameters()]
    weights += [] if learner.critic is None else list(learner.critic.head.parameters())
    for weight in weights:
        weight.grad = None
    groups = list(range(len(experience.prompts)))
    metrics = merge(learner.accumulate(experience, groups, learner.counts(experience, groups), 0.04))
    values = {name: metric.value for name, metric in metrics.items()}
    return values, [w.grad.clone() for w in weights if w.grad is not None]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert max(float(x.abs().max()) for x in want) > 1e-6, "nothing was learned"
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))


# of the two roles one needs two adapters, one answers that improve others; their losses are seen here
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in TWO_ROLES])
def test_what_stands_for_the_log_probs_of_a_tool_changes_nothing(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Every algorithm, on hidden states that are a table by the token before: no trunk is needed for it."""
    algorithm = ALGORITHMS[name](**REQUIRED.get(name, {}))
    table = torch.randn(99, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table.requires_grad_()
    for policy in exact_pair(tiny_model_dir):
        monkeypatch.setattr(policy, "hidden", lambda packed: table[packed.token_ids[packed.rows]])
    learner, experience = built(tiny_model_dir, algorithm, episodes())
    _, spoiled = built(tiny_model_dir, algorithm, with_garbage(episodes()))
    assert not experience.loss_mask.all() and experience.turn.max() >= 1
    assert torch.equal(spoiled.advantages, experience.advantages)
    metrics, gradients = learned(learner, experience, [table])
    others, got = learned(learner, spoiled, [table])
    assert others == metrics
    assert_same(got, gradients)
    [micro] = microbatches(experience, range(len(experience.prompts)), 4096)
    before, chosen = micro.packed.token_ids[micro.packed.rows], experience.loss_mask[micro.index]
    never = set(integers(before[~chosen])) - set(integers(before[chosen]))
    assert never and gradients[0][sorted(never)].abs().max() == 0


@pytest.mark.parametrize("name", ["ppo", "dpo", "nash_md", "dtpo"])
def test_layouts_and_microbatches_change_neither_loss_nor_gradient(tiny_model_dir: Path, name: str):
    algorithm = ALGORITHMS[name](**REQUIRED.get(name, {}))
    learner, experience = built(tiny_model_dir, algorithm, episodes())
    if experience.critic is not None:
        targets = CriticTargets(experience.critic.values.double(), experience.critic.returns.double())
        experience = replace(experience, critic=targets)
    metrics, gradients = learned(learner, experience)
    learner.section = learner.section.model_copy(update={"microbatch_tokens": 30})
    for layout in LAYOUTS:
        learner.policy.layout = layout
        try:
            others, got = learned(learner, experience)
        finally:
            learner.policy.layout = "shared_prefix"
        assert others == pytest.approx(metrics, rel=1e-10, abs=1e-12)
        assert_same(got, gradients)


@dataclass
class Asked:
    """The targets and statistics that the head was asked for, with their number."""

    targets: list[Tensor]
    counts: list[int]
    want: list[tuple[str, ...]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found, token_stats = Asked([], [], []), heads.token_stats

    def recorded(hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any) -> TokenStats:
        found.targets.append(targets)
        found.counts.append(arguments["num_unmasked"])
        found.want.append(arguments["want"])
        return token_stats(hidden, weight, targets, **arguments)

    monkeypatch.setattr(heads, "token_stats", recorded)
    return found


def test_the_head_computes_nothing_of_what_a_tool_said(tiny_model_dir: Path, asked: Asked):
    algorithm = ALGORITHMS["grpo"](kl=KL(coef=0.1, estimator="exact"))
    learner, experience = built(tiny_model_dir, algorithm, episodes())
    learned(learner, experience)
    # 7 + 1 + 4 + 9 and 7 + 1 tokens, of which 4 + 1 + 3 + 4 and 4 + 1 are the policy's; two passes
    assert [len(t) for t in asked.targets] == [29, 29] and asked.counts == [17, 17]
    [micro] = microbatches(experience, [0, 1], 4096)
    expected = experience.token_ids.masked_fill(~experience.loss_mask, IGNORED)[micro.index]
    assert all(torch.equal(targets, expected) for targets in asked.targets)
    assert experience.old_logprobs is not None and learner.entropy is None
    for statistic in (experience.old_logprobs, learner.policy.statistics(micro.packed, **ALL).entropy):
        assert statistic is not None
        assert torch.equal(statistic != 0, experience.loss_mask)


ALL: dict[str, Any] = {"temperature": 1.0, "want": ("logprob", "entropy")}


def own_logits(policy: Policy, group: Group, t: Trajectory) -> Tensor:
    """`[tokens, V]` by the model's own forward over prompt and episode alone."""
    prompt = group.prompt.token_ids
    layout, policy.layout = policy.layout, "padded"
    logits = policy.model(input_ids=torch.tensor([prompt + t.token_ids])).logits[0, len(prompt) - 1 : -1]
    policy.layout = layout
    return logits


def chosen_statistics(policy: Policy, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the tokens that the policy chose, by the model's own forward."""
    logprobs, entropies = list[Tensor](), list[Tensor]()
    for group, t in ((g, t) for g in groups for t in g.trajectories):
        full, chosen = own_logits(policy, group, t).log_softmax(-1), torch.tensor(t.loss_mask)
        logprobs.append(full.gather(1, torch.tensor(t.token_ids)[:, None])[:, 0][chosen])
        entropies.append(-(full.exp() * full).sum(-1)[chosen])
    return torch.cat(logprobs), torch.cat(entropies)


def test_metrics_are_means_over_the_tokens_that_the_policy_chose(tiny_model_dir: Path):
    groups = episodes()
    learner, experience = built(tiny_model_dir, ALGORITHMS["grpo"](), groups)
    metrics, _ = learned(learner, experience)
    policy, reference = exact_pair(tiny_model_dir)
    with torch.no_grad():
        (logprobs, entropies), (others, _) = (chosen_statistics(p, groups) for p in (policy, reference))
    stated = [
        p
        for g in groups
        for t in g.trajectories
        for p, chosen in zip(t.rollout_logprobs or (), t.loss_mask, strict=True)
        if chosen
    ]
    apart, gap = logprobs - others, logprobs - torch.tensor(stated)
    expected = {
        "entropy": entropies.mean(),
        "perplexity": (-logprobs).mean().exp(),
        "kl/ref": ((-apart).exp() - 1 + apart).mean(),
        "mismatch/k3": (gap.exp() - 1 - gap).mean(),
        "mismatch/ratio_max": gap.exp().max(),
        "ratio/mean": torch.tensor(1.0),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    assert length_metrics(groups)["length/mean"].value == 17 / 6


def test_truncated_sampling_in_turns_is_scored_over_the_candidates_of_each_turn(
    tiny_model_dir: Path, asked: Asked
):
    """A tool's tokens were drawn from nothing: they have no candidates, and ask for no whole vocabulary."""

    def truncated(t: Trajectory) -> Trajectory:
        pairs = zip(t.token_ids, t.loss_mask, strict=True)
        ids = [(i, (i + 1) % 99, (i + 40) % 99) if chosen else () for i, chosen in pairs]
        return replace(t, candidates=Candidates.of(ids))

    groups = [replace(g, trajectories=tuple(map(truncated, g.trajectories))) for g in episodes()]
    _, experience = built(tiny_model_dir, ALGORITHMS["grpo"](), groups)
    assert not asked.want and experience.old_logprobs is not None
    expected: list[float] = []
    policy, _ = exact_pair(tiny_model_dir)
    for group, t in ((g, t) for g in groups for t in g.trajectories):
        for row, (i, chosen) in zip(
            own_logits(policy, group, t).detach(), zip(t.token_ids, t.loss_mask, strict=True), strict=True
        ):
            among = row[[i, (i + 1) % 99, (i + 40) % 99]].log_softmax(-1)
            expected.append(among[0].item() if chosen else 0.0)
    assert experience.old_logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    # a completion cut at its limit may be taken out of the loss: its candidates are not read either
    cut = replace(groups[1].trajectories[0], finish_reason=FinishReason.LENGTH)
    groups = [groups[0], replace(groups[1], trajectories=(cut, *groups[1].trajectories[1:]))]
    _, experience = built(tiny_model_dir, ALGORITHMS["dapo"](max_tokens=16, drop_truncated=True), groups)
    assert experience.old_logprobs is not None and int(experience.loss_mask.sum()) == 17 - 4
    assert torch.equal(experience.old_logprobs != 0, experience.loss_mask)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_microbatch_of_nothing_but_a_tool_has_a_gradient_of_zero(tiny_model_dir: Path, name: str):
    silent = Group(Prompt("r", (7,), "r"), (episode("0000", 1.0, 60),))
    learner, experience = built(tiny_model_dir, ALGORITHMS[name](), [*episodes(), silent])
    learner.policy.model.zero_grad()
    learner.accumulate(experience, [2], learner.counts(experience, [0, 1, 2]), 0.04)
    gradients = [p.grad for p in learner.policy.model.parameters()]
    assert gradients and all(g is not None and not g.any() for g in gradients)


def test_tokens_are_counted_by_turn_over_the_whole_update_and_all_ranks(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    learner, experience = built(tiny_model_dir, ALGORITHMS["dtpo"](tool_objectives=("short",)), episodes())
    # 11|11, 1, 1|11 and 11|1|1 of the first prompt, 11|11 and 1 of the second
    both, second = (learner.counts(experience, groups) for groups in ([0, 1], [1]))
    assert (both.earlier_tokens, both.last_tokens, both.tokens) == (2 + 0 + 1 + 3 + 2 + 0, 9, 17)
    assert (second.earlier_tokens, second.last_tokens) == (2, 3)
    monkeypatch.setattr(World, "all_sum", lambda _, t: 3 * t)
    three = learner.counts(experience, [0, 1])
    assert (three.earlier_tokens, three.last_tokens, three.tokens) == (3 * 8, 3 * 9, 3 * 17)


def test_the_loss_by_turn_is_the_sum_of_two_means_over_the_update(tiny_model_dir: Path):
    """At the weights before the update, where each token's loss is minus its advantage."""
    algorithm = ALGORITHMS["dtpo"](tool_objectives=("short",), earlier_weight=0.5, mismatch=Mismatch("none"))
    learner, experience = built(tiny_model_dir, algorithm, episodes())
    learner.section = learner.section.model_copy(update={"microbatch_tokens": 30})
    metrics, _ = learned(learner, experience)
    mask, starts = experience.loss_mask, [0, 7, 8, 12, 21, 28, 29]
    last = torch.cat([experience.turn[a:b] == experience.turn[a:b].max() for a, b in pairwise(starts)])
    earlier, answers = (-experience.advantages[mask & part].double().mean().item() for part in (~last, last))
    assert metrics["loss/policy"] == pytest.approx(0.5 * earlier + answers, rel=1e-6)


def test_an_objective_that_no_completion_has_is_named(tiny_model_dir: Path):
    algorithm = ALGORITHMS["dtpo"](tool_objectives=("short", "crop"))
    with pytest.raises(RewardError, match=r"has the objective crop, .* they have right, short;"):
        built(tiny_model_dir, algorithm, episodes())
    lost = [
        replace(g, trajectories=tuple(replace(t, reward=None) for t in g.trajectories)) for g in episodes()
    ]
    assert len(built(tiny_model_dir, algorithm, lost)[1].token_ids) == 0
