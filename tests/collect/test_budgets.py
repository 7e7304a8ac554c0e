"""Budgets of completions per prompt: the total is constant, shares follow success rates, resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from rlhf.collect.budgets import Budgets
from rlhf.config.load import make_config
from rlhf.config.reward import RewardConfig
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.identity import identity
from rlhf.rewards.success import is_correct
from rlhf.types import Group, Prompt
from tests.support import ALONE, bandit_settings, metrics_of, train, trajectory

REWARD = RewardConfig.model_validate({"functions": [{"path": "a:b"}]})


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (3, i), "x") for i in range(count)]


def group(prompt: Prompt, right: int, wrong: int) -> Group:
    return Group(prompt, tuple(trajectory([4], r) for r in [1.0] * right + [0.0] * wrong))


def config(reward: dict[str, Any] | None = None, **budget: object) -> Config:
    return make_config(
        {
            "run_dir": "r",
            "steps": 1,
            "model": {"path": "m"},
            "data": {"train": "t.jsonl"},
            "algorithm": "grpo",
            "reward": reward or {"functions": [{"path": "a:b"}]},
            "rollout": {"group_size": 8},
            "budget": budget,
        }
    )


def budgets(**settings: Any) -> Budgets:
    return Budgets(config(rule="knapsack", **settings), ALONE)


def test_prompts_never_seen_get_the_uniform_share():
    assert budgets().sizes(prompts(5)) == [8] * 5


def test_the_total_is_that_of_uniform_and_goes_where_it_teaches():
    rule = budgets()
    hard, middle, easy, solved = prompts(4)
    rule.observe([group(hard, 1, 9), group(middle, 3, 7), group(easy, 9, 1), group(solved, 10, 0)])
    sizes = rule.sizes([hard, middle, easy, solved])
    assert sum(sizes) == 32
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == 2


def test_what_is_measured_has_a_value_and_a_meaning():
    hard, solved = prompts(2)
    groups = [group(hard, 1, 3), group(solved, 4, 0)]
    # 1 / 4 and 4 / 4 are correct; the other buckets are empty and have no size
    assert {name for name in budgets().observe(groups) if "size" in name} == {
        "budget/size_20_80",
        "budget/size_100",
    }
    uniform = Budgets(config(), ALONE)
    found = uniform.observe(groups)
    assert found["budget/solved_100"].value == found["budget/effective_ratio"].value == 0.5
    assert not any("size" in name or "largest" in name for name in found)
    # win rates, and rewards that are only measured, say of no prompt that it is solved
    judged = Budgets(config({"preference": {"path": "a:b"}}), ALONE)
    assert judged.observe(groups) == uniform.observe([]) == {}
    assert Budgets(config(), ALONE, learns_rewards=False).observe(groups) == {}


def test_with_a_prior_one_visit_is_enough():
    rule = budgets(prior=1.0)
    easy, hard = prompts(2)
    rule.observe([group(easy, 2, 0), group(hard, 0, 2)])
    sizes = rule.sizes([easy, hard])
    assert sum(sizes) == 16 and sizes[1] > sizes[0]


def test_completions_whose_reward_failed_say_nothing_about_their_prompt():
    rule = budgets()
    (prompt,) = prompts(1)
    failed = tuple(trajectory([4], None) for _ in range(8))
    rule.observe([Group(prompt, failed)])
    assert rule.tracker.rate(identity(prompt)) is None, "it is not seen yet"
    rule.observe([Group(prompt, group(prompt, 6, 2).trajectories + failed)])
    assert rule.tracker.rate(identity(prompt)) == 0.75
    probed = budgets(prior=1.0, probes=2)
    easy, broken = prompts(2)
    sizes = probed.rest([group(easy, 1, 1), Group(broken, failed[:2])])
    assert sizes == probed.rest([group(easy, 1, 1), Group(broken, ())]), "as of one that is new"


def test_with_probes_the_rest_goes_where_the_posterior_says_and_the_total_stays():
    rule = budgets(prior=1.0, probes=2)
    seen = prompts(4)
    assert rule.sizes(seen) == [2] * 4
    rest = rule.rest([group(seen[0], 2, 0), group(seen[1], 1, 1), group(seen[2], 0, 2), group(seen[3], 0, 2)])
    assert sum(rest) + 8 == 32 and min(rest) >= 0
    # posterior means 3/4, 1/2, 1/4, 1/4
    assert rest[0] <= rest[1] and rest[0] < rest[2] == rest[3]
    assert budgets().rest([group(seen[0], 2, 0)]) == [0]


def test_probes_are_judged_together_with_what_was_seen_before_and_counted_once():
    rule = budgets(prior=1.0, probes=2)
    easy, hard = prompts(2)
    rule.observe([group(easy, 9, 1), group(hard, 1, 9)])
    probes = [group(easy, 1, 1), group(hard, 1, 1)]
    assert rule.rest(probes) == rule.rest(probes)
    assert rule.rest(probes)[1] > rule.rest(probes)[0]


def test_with_a_cost_in_tokens_short_completions_are_sampled_more():
    rule = budgets(prior=1.0, cost="tokens")
    short, long = prompts(2)
    brief = Group(short, tuple(trajectory([4] * 5, r) for r in (1.0, 0.0)))
    wordy = Group(long, tuple(trajectory([4] * 50, r) for r in (1.0, 0.0)))
    rule.observe([brief, wordy])
    sizes = rule.sizes([short, long])
    assert sizes[0] > sizes[1]
    # at most the tokens expected of a uniform step, and less than one completion below them
    assert 8 * 55 - 50 <= 5 * sizes[0] + 50 * sizes[1] <= 8 * 55


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 2}, "budget.probes needs a success rate of every prompt"),
        ({"cost": "tokens"}, "budget.cost = tokens needs a success rate of every prompt"),
        ({"probes": 4, "low": 2, "prior": 1.0}, "but must be at most budget.low = 2"),
        ({"probes": 2, "cost": "tokens", "prior": 1.0}, "budget.cost must be completions"),
    ],
)
def test_budgets_that_cannot_be_are_refused_when_the_config_is_read(
    tmp_path: Path, tiny_model_dir: Path, settings: dict[str, object], message: str
):
    tree = bandit_settings(tmp_path, tiny_model_dir, budget={"rule": "knapsack"} | settings)
    with pytest.raises(ConfigError, match=message):
        make_config(tree)


@pytest.mark.parametrize("settings", [{"probes": 2}, {"cost": "tokens"}])
def test_a_run_with_it_spends_what_a_uniform_one_would(
    tmp_path: Path, tiny_model_dir: Path, settings: dict[str, object]
):
    budget = {"rule": "knapsack", "prior": 1.0, "high": 16} | settings
    tree = bandit_settings(tmp_path, tiny_model_dir, steps=3, budget=budget, monitor={"samples_per_step": 8})
    train(tree)
    config = make_config(tree)
    uniform = config.rollout.prompts_per_step * config.rollout.group_size
    spent = [record["rollout/samples"] for record in metrics_of(tmp_path)]
    assert spent[0] == uniform
    assert settings == {"cost": "tokens"} or spent == [uniform] * 3
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    spreads = [pstdev(c["reward"] for c in g["completions"]) for g in shown if g["step"] == 1]
    assert metrics_of(tmp_path)[0]["reward/std"] == pytest.approx(fmean(spreads)), "of whole groups"


def test_success_is_what_the_config_says():
    by_objective = REWARD.model_copy(update={"success_objective": "right", "success_threshold": 1.0})
    sample = trajectory([4], 1.4, objectives={"right": 0.9, "brief": 0.5})
    assert is_correct(sample, REWARD) and not is_correct(sample, by_objective)
    assert not is_correct(trajectory([4], None), REWARD)


def test_the_state_brings_everything_back():
    one, other = budgets(), budgets()
    seen = prompts(3)
    one.observe([group(p, i, 9 - i) for i, p in enumerate(seen)])
    other.load(one.state(), one.tensors())
    assert one.sizes(seen) == other.sizes(seen)
