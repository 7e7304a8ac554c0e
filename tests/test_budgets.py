"""Budgets in a run: the total stays, the share follows the success rates, nothing is lost on resume."""

from __future__ import annotations

from rlhf.budgets import Budgets, is_right
from rlhf.config import BudgetConfig, RewardConfig
from rlhf.types import Group, Prompt
from tests.support import ALONE, trajectory

REWARD = RewardConfig.model_validate({"functions": [{"path": "a:b"}]})


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (3,), "x") for i in range(count)]


def group(prompt: Prompt, right: int, wrong: int) -> Group:
    return Group(prompt, tuple(trajectory([4], r) for r in [1.0] * right + [0.0] * wrong))


def budgets(**settings: object) -> Budgets:
    return Budgets(BudgetConfig.model_validate({"rule": "knapsack"} | settings), REWARD, 8, ALONE)


def test_prompts_never_seen_get_the_uniform_share():
    assert budgets().sizes(prompts(5)) == [8] * 5


def test_the_total_is_that_of_uniform_and_goes_where_it_teaches():
    rule = budgets()
    hard, middle, easy, solved = prompts(4)
    rule.observe([group(hard, 1, 9), group(middle, 3, 7), group(easy, 9, 1), group(solved, 10, 0)])
    sizes = rule.sizes([hard, middle, easy, solved])
    assert sum(sizes) == 32
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == 2


def test_with_a_prior_one_visit_is_enough():
    rule = budgets(prior=1.0)
    easy, hard = prompts(2)
    rule.observe([group(easy, 2, 0), group(hard, 0, 2)])
    sizes = rule.sizes([easy, hard])
    assert sum(sizes) == 16 and sizes[1] > sizes[0]


def test_success_is_what_the_config_says():
    by_objective = REWARD.model_copy(update={"success_objective": "right", "success_threshold": 1.0})
    sample = trajectory([4], 1.4, objectives={"right": 0.9, "brief": 0.5})
    assert is_right(sample, REWARD) and not is_right(sample, by_objective)
    assert not is_right(trajectory([4], None), REWARD)


def test_the_state_brings_everything_back():
    one, other = budgets(), budgets()
    seen = prompts(3)
    one.observe([group(p, i, 9 - i) for i, p in enumerate(seen)])
    other.load(one.state(), one.tensors())
    assert one.sizes(seen) == other.sizes(seen)
