"""Held-out preference pairs: ranking accuracy by hand, and the same figures however they are computed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.checkpoints.stateful import CheckpointError
from rlhf.config.learner import DistributedConfig
from rlhf.config.model import LoraConfig, ModelConfig
from rlhf.distributed.shards import own_rows
from rlhf.distributed.world import World, world
from rlhf.evaluation.accuracy import with_pairs
from rlhf.evaluation.likelihood import Likelihood
from rlhf.evaluation.pairs import LogProbs, PairEvaluation, PairResult, as_pair, idealised_margin, summary
from rlhf.learn.models import Models
from rlhf.models.loading import load_sharded_policy
from rlhf.models.policy import Policy, WithoutAdapter
from rlhf.models.sharding import Sharding
from rlhf.types import Duel, Group
from tests.ranks import together
from tests.support import ALONE, group, policy_of, random_groups

BLAND = Likelihood(0.9, 1.0, 1.1)


def pair(chosen: int = 1, rejected: int = 1, probability: float | None = None) -> Group:
    """A pair of completions of so many tokens."""
    plain = group("q", [7], [[5] * chosen, [6] * rejected], [1.0, 0.0])
    return plain if probability is None else replace(plain, duels=(Duel(0, 1, probability),))


def judged(
    policy: Sequence[tuple[float, float]],
    reference: Sequence[tuple[float, float]],
    *,
    groups: Sequence[Group] = (),
    beta: float | None = None,
) -> PairResult:
    """The summary of pairs with these log-probs of (chosen, rejected)."""
    pairs = [as_pair(g) for g in groups or [pair()] * len(policy)]
    now, before = ([LogProbs(*row) for row in rows] for rows in (policy, reference))
    return summary(pairs, now, before, [BLAND] * len(pairs), beta)


def test_accuracies_of_four_pairs_by_hand():
    # D of (chosen, rejected): (2, -5), (-1, -5), (0, 0), (-4, 1); so two are right, one is a tie
    reference = [(-10.0, -12.0), (-20.0, -15.0), (-8.0, -7.0), (-3.0, -9.0)]
    policy = [(-8.0, -17.0), (-21.0, -20.0), (-8.0, -7.0), (-7.0, -8.0)]
    lengths = [pair(4, 4), pair(10, 5), pair(2, 1), pair(7, 2)]
    found = judged(policy, reference, groups=lengths)
    assert found.accuracy == (1 + 1 + 0.5 + 0) / 4
    assert found.margin == (7 + 4 + 0 - 5) / 4
    assert found.chosen_logratio == (2 - 1 + 0 - 4) / 4
    # log-probs alone: the reference has 1 0 0 1, the policy 1 0 0 1, so of two wrong pairs none is right now
    assert (found.accuracy_reference, found.accuracy_logprob, found.flipped) == (0.5, 0.5, 0.0)
    # a token: -2 > -4.25, -2.1 > -4, -4 > -7, -1 > -4
    assert found.accuracy_per_token == 1.0
    assert found.idealised is None
    # "plus four": (1 + 1 + .5 + 0 + 0 + 0 + 1 + 1) / 8 = .5625, variance .2148, margin 1.96 sqrt(.2148 / 8)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.2413, 0.8837), abs=1e-4)
    assert (found.topk_mass, found.topk_entropy, found.topk_entropy_normalised) == pytest.approx(BLAND)


def test_of_the_pairs_that_the_reference_has_wrong_a_third_is_right_now():
    reference = [(-5.0, -4.0), (-5.0, -3.0), (-5.0, -2.0), (-2.0, -5.0)]
    policy = [(-4.0, -5.0), (-5.0, -4.0), (-5.0, -4.0), (-5.0, -4.0)]
    assert judged(policy, reference).flipped == pytest.approx(1 / 3)
    assert judged(policy[3:], reference[3:]).flipped is None


def test_a_soft_label_below_a_half_turns_the_pair_and_a_half_counts_half():
    logprobs, start = [(-1.0, -2.0)], [(-2.0, -1.0)]
    accuracies = {p: judged(logprobs, start, groups=[pair(probability=p)]).accuracy for p in (0.9, 0.5, 0.2)}
    # the policy's log-probs are given in the order (better, worse) of the label
    assert accuracies == {0.9: 1.0, 0.5: 0.5, 0.2: 1.0}
    turned = as_pair(pair(2, 3, probability=0.2))
    assert (turned.lengths, turned.probability) == ((3, 2), pytest.approx(0.8))
    assert as_pair(replace(pair(2, 3), duels=(Duel(1, 0, 0.9),))).lengths == (3, 2)
    assert as_pair(pair()).probability is None
    swapped = group("q", [7], [[5], [6, 6]], [0.2, 0.7])
    assert as_pair(swapped).lengths == (2, 1), "rewards order a pair as well"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            group("file:3", [7], [[5], [6], [8]], [1.0, 0.0, 0.0]),
            "file:3: a held-out pair has two completions",
        ),
        (
            group("file:3", [7], [[5], []], [1.0, 0.0]),
            "file:3: a completion of this held-out pair has no tok",
        ),
        (group("file:3", [7], [[5], [6]], [1.0, None]), "file:3: .* has no reward"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_line(wrong: Group, said: str):
    with pytest.raises(ValueError, match=said):
        as_pair(wrong)


@pytest.mark.parametrize(("c", "threshold"), [(5.0, 0.474077), (30.0, 0.048587), (-3.0, 0.854355)])
def test_the_dpo_loss_below_which_a_pair_is_ranked_rightly(c: float, threshold: float):
    """Theorem 4.1 of arXiv:2405.19534: the ranking is right iff the loss is at most -log sigmoid(beta c),
    with c = log reference(rejected) - log reference(chosen). For c = 5, beta .1: ln(1 + e^-.5) = .474077."""
    beta, reference = 0.1, (-50.0, -50.0 + c)
    assert math.log1p(math.exp(-beta * c)) == pytest.approx(threshold, abs=1e-6)
    for aside in (-0.01, 0.01):
        # the policy's log-probs differ by `aside`, so D_w - D_l = c + aside
        policy = (-60.0 + aside, -60.0)
        loss = math.log1p(math.exp(-beta * (policy[0] - policy[1] - reference[0] + reference[1])))
        found = judged([policy], [reference])
        assert (found.accuracy_logprob == 1.0) == (loss <= threshold + 1e-6) == (aside > 0)


def test_the_ipo_loss_below_which_a_pair_is_ranked_rightly():
    """Proposition A.7: with c' = log reference(w) / reference(l) = 5 and tau .1, L <= (5 + 5)^2 = 100."""
    tau, reference = 0.1, (-50.0, -55.0)
    for aside in (-0.01, 0.01):
        policy = (-60.0 + aside, -60.0)
        h = policy[0] - policy[1] - (reference[0] - reference[1])
        loss = (h - 1 / (2 * tau)) ** 2
        assert (judged([policy], [reference]).accuracy_logprob == 1.0) == (loss <= 100.0) == (aside > 0)


@pytest.mark.parametrize(
    ("ref_log_ratio", "agreement", "beta", "margin"),
    # ln 3 = 1.0986; ln 999 = 6.9068; ln 1.5 = .4055
    [(-20, 0.75, 0.1, -9.01), (-20, 0.75, 0.05, 1.97), (-60, 0.999, 0.1, 9.07), (-5, 0.6, 0.1, -0.945)],
)
def test_the_margin_at_the_optimum_of_dpo(ref_log_ratio: float, agreement: float, beta: float, margin: float):
    assert idealised_margin(ref_log_ratio, agreement, beta) == pytest.approx(margin, abs=5e-3)
    soft = pair(probability=agreement)
    found = judged([(0.0, 0.0)], [(ref_log_ratio, 0.0)], groups=[soft], beta=beta)
    assert found.idealised == float(margin > 0)


def test_an_unknown_agreement_is_taken_to_be_three_quarters_and_a_certain_one_a_thousandth_less():
    assert judged([(0.0, 0.0)] * 2, [(-20.0, 0.0), (-10.0, 0.0)], beta=0.1).idealised == 0.5
    certain = [pair(probability=1.0)] * 2
    # ln(.999 / .001) / .1 = 69.07: -69 is made up for, -70 is not
    assert judged([(0.0, 0.0)] * 2, [(-69.0, 0.0), (-70.0, 0.0)], groups=certain, beta=0.1).idealised == 0.5


def models(policy: Policy, reference: Policy | None = None) -> Models:
    return Models(algorithm=ALGORITHMS["grpo"](kl=KL()), policy=policy, reference=reference)


def evaluation(
    groups: Sequence[Group],
    of: Models,
    *,
    budget: int = 64,
    beta: float | None = 0.1,
    temperature: float = 1.0,
) -> PairEvaluation:
    return PairEvaluation(groups, of, ALONE, temperature=temperature, microbatch_tokens=budget, beta=beta)


def moved(policy: Policy) -> Policy:
    """The policy with other weights: each matrix plus a part of itself, rolled along its rows."""
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.ndim > 1:
                own = own_rows(weight)
                own += 0.05 * own.roll(1, -1)
    return policy


PAIRS = random_groups(3, sizes=[2] * 7)


@pytest.fixture(scope="module")
def figures(tiny_model_dir: Path) -> PairResult:
    """Of every pair by itself, from the model's own logits, in float64."""
    policy = moved(policy_of(tiny_model_dir, dtype=torch.float64))
    reference = policy_of(tiny_model_dir, dtype=torch.float64)
    pairs = [as_pair(g) for g in PAIRS]
    now, before = list[LogProbs](), list[LogProbs]()
    likelihood: list[Likelihood] = []
    with torch.no_grad():
        for one in pairs:
            prompt = list(one.group.prompt.token_ids)
            for which, found in ((policy, now), (reference, before)):
                which.layout = "padded"
                logps: list[float] = []
                for k, t in enumerate(one.group.trajectories):
                    ids = torch.tensor([[*prompt, *t.token_ids]])
                    logits = which.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
                    p = logits.log_softmax(-1)
                    logps.append(float(p.gather(1, torch.tensor(t.token_ids)[:, None]).sum()))
                    if which is policy and k == 0:
                        top = p.exp().sort(descending=True).values[:, :10]
                        mass, q = top.sum(1), top / top.sum(1, keepdim=True)
                        likelihood.append(
                            Likelihood(
                                float(mass.mean()),
                                float(-(top * top.log()).sum(1).mean()),
                                float(-(q * q.log()).sum(1).mean()),
                            )
                        )
                found.append(LogProbs(*logps))
    return summary(pairs, now, before, likelihood, 0.1)


def assert_same(found: PairResult, expected: PairResult, tolerance: float = 1e-4) -> None:
    for name in PairResult.__dataclass_fields__:
        if name != "samples":
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=tolerance), name
    got, want = ([s["margin"] for s in r.samples] for r in (found, expected))
    assert got == pytest.approx(want, abs=tolerance)


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_no_layout_and_no_microbatch_changes_a_figure(
    tiny_model_dir: Path, figures: PairResult, layout: str, budget: int
):
    of = models(moved(policy_of(tiny_model_dir, packing=layout)), policy_of(tiny_model_dir, packing=layout))
    evaluated = evaluation(PAIRS, of, budget=budget)
    evaluated.prepare()
    assert_same(evaluated.evaluate(), figures)
    assert len({s["right"] for s in figures.samples}) == 2, "some pairs are right and some are wrong"


def test_at_the_start_every_pair_is_a_tie_for_all_kinds_of_reference(tiny_model_dir: Path):
    policy, adapted = policy_of(tiny_model_dir), policy_of(tiny_model_dir)
    adapted.add_adapter(LoraConfig(rank=2), seed=0)
    for of in (
        models(policy),
        models(policy, policy_of(tiny_model_dir)),
        models(adapted, WithoutAdapter(adapted)),
    ):
        evaluated = evaluation(PAIRS, of)
        assert "of 7 held-out pairs" in evaluated.prepare()
        found = evaluated.evaluate()
        assert (found.accuracy, found.margin, found.flipped) == (0.5, 0.0, 0.0)
        assert found.accuracy_logprob == found.accuracy_reference


def test_without_a_reference_a_resumed_run_compares_with_the_policy_before_step_1(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    first = evaluation(PAIRS, models(policy))
    line = first.prepare()
    moved(policy)
    expected = first.evaluate()
    resumed = evaluation(PAIRS, models(policy))
    resumed.load(json.loads(json.dumps(first.state())), {})
    assert resumed.prepare() == line
    assert resumed.evaluate() == expected
    assert expected.accuracy != 0.5
    # what was saved before anything was known is nothing
    early = evaluation(PAIRS, models(policy))
    early.load(evaluation(PAIRS, models(policy)).state(), {})
    early.prepare()
    assert early.evaluate().margin == 0.0


def test_other_pairs_are_asked_of_the_reference_again_or_refused(tiny_model_dir: Path):
    policy, reference = moved(policy_of(tiny_model_dir)), policy_of(tiny_model_dir)
    saved = evaluation(PAIRS, models(policy, reference))
    saved.prepare()
    others = random_groups(4, sizes=[2] * 3)
    fresh, resumed = (evaluation(others, models(policy, reference)) for _ in range(2))
    resumed.load(saved.state(), {})
    for one in (fresh, resumed):
        one.prepare()
    assert resumed.evaluate() == fresh.evaluate()
    with pytest.raises(CheckpointError, match="compared with the policy before step 1"):
        evaluation(others, models(policy)).load(saved.state(), {})
    with pytest.raises(CheckpointError, match=r"rollout\.temperature"):
        evaluation(PAIRS, models(policy), temperature=0.5).load(saved.state(), {})


def test_pairs_are_scored_at_the_temperature_of_the_learner(tiny_model_dir: Path):
    policy, sharp = moved(policy_of(tiny_model_dir)), moved(policy_of(tiny_model_dir))
    with torch.no_grad():
        sharp.head.module.weight *= 2.0
    found = [
        evaluation(PAIRS, models(p, policy_of(tiny_model_dir)), temperature=t)
        for p, t in ((policy, 0.5), (sharp, 1.0))
    ]
    for one in found:
        one.prepare()
    half, twice = (one.evaluate() for one in found)
    assert half.topk_mass == pytest.approx(twice.topk_mass, abs=1e-6)
    assert half.topk_entropy != pytest.approx(evaluation_at_1(policy, tiny_model_dir).topk_entropy, abs=1e-3)


def evaluation_at_1(policy: Policy, folder: Path) -> PairResult:
    one = evaluation(PAIRS, models(policy, policy_of(folder)))
    one.prepare()
    return one.evaluate()


def test_it_says_how_far_it_is_and_asks_whether_to_stop(tiny_model_dir: Path):
    heard: list[str] = []
    asked: list[int] = []
    evaluated = evaluation(PAIRS, models(policy_of(tiny_model_dir)), budget=1)
    evaluated.prepare()
    evaluated.evaluate(lambda: asked.append(1), heard.append)
    total = sum(len(t.token_ids) for g in PAIRS for t in g.trajectories)
    assert len(asked) == len(heard) == 2 * len(PAIRS)
    assert heard[-1] == f"{total} of {total} tokens of pairs"


def on_ranks(folder: str, sharded: bool, pairs: int, expected: PairResult) -> None:
    with world() as here:
        assert_same(found_on(here, folder, sharded, PAIRS[:pairs]), expected)


def found_on(here: World, folder: str, sharded: bool, groups: Sequence[Group]) -> PairResult:
    section = ModelConfig(path=folder)
    if sharded:
        sharding = Sharding.of(DistributedConfig(mode="sharded"), torch.float32, here)
        assert sharding is not None
        policy = moved(load_sharded_policy(section, folder, sharding, trains=True))
        reference = load_sharded_policy(section, folder, sharding, trains=False)
    else:
        policy, reference = moved(policy_of(Path(folder))), policy_of(Path(folder))
    evaluated = PairEvaluation(
        groups, models(policy, reference), here, temperature=1.0, microbatch_tokens=40, beta=0.1
    )
    evaluated.prepare()
    return evaluated.evaluate()


@pytest.mark.multi
@pytest.mark.parametrize(("sharded", "pairs"), [(False, 7), (True, 7), (True, 1)])
def test_two_ranks_find_what_one_finds(tiny_model_dir: Path, sharded: bool, pairs: int):
    """Also where the second rank has no pair at all."""
    evaluated = evaluation(PAIRS[:pairs], models(moved(policy_of(tiny_model_dir)), policy_of(tiny_model_dir)))
    evaluated.prepare()
    together(2, on_ranks, str(tiny_model_dir), sharded, pairs, evaluated.evaluate())


def test_checkpoints_are_compared_by_pairs_only_where_nothing_was_sampled():
    found = judged([(-1.0, -2.0)], [(-2.0, -1.0)])
    alone = with_pairs(None, found, 4)
    assert (alone.score, alone.measure, alone.accuracy, alone.step) == (1.0, "pairs", None, 4)
    sampled = replace(alone, accuracy=0.25, num_samples=8, measure="accuracy", pairs=None)
    assert with_pairs(sampled, found, 4).score == 0.25
    rewarded = replace(sampled, measure="reward", reward=-3.0)
    assert with_pairs(rewarded, found, 4).score == -3.0
