from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algos.budget import (
    SuccessTracker,
    allocate,
    allocate_tokens,
    budget_metrics,
    confident_rollouts,
    mixed_probability,
    value,
)

# shares of rollouts: no double so near to 0 that its square, and with it every gain, is 0
rates = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.25, 0.5]), st.floats(1e-9, 1.0))
batches = st.lists(rates, min_size=1, max_size=12)
mixed_rates = st.floats(0.01, 0.99)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float | None], int, int, int]:
    success_rates = draw(batches)
    low = draw(st.integers(1, 4))
    high = low + draw(st.integers(0, 30))
    total = draw(st.integers(low * len(success_rates), high * len(success_rates)))
    return success_rates, total, low, high


@pytest.mark.parametrize(
    ("n", "p", "expected"),
    [(8, 0.5, 0.1240234), (8, 0.1, 0.0461322), (8, 0.9, 0.0051258), (64, 0.05, 0.0434317)],
)
def test_values_are_the_numbers_worked_out_by_hand(n: int, p: float, expected: float):
    assert value(n, p) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, 0.0772553), (0.05, 0.3365796), (0.1, 0.5695328), (0.5, 0.9921875)]
)
def test_the_chance_of_both_outcomes_is_the_number_worked_out_by_hand(p: float, expected: float):
    assert mixed_probability(8, p) == pytest.approx(expected, abs=5e-8)


@given(p=st.floats(0.0, 1.0), n=st.integers(0, 200))
def test_no_rollout_or_one_or_a_sure_outcome_is_worth_nothing(p: float, n: int):
    assert value(0, p) == 0.0
    assert value(1, p) == pytest.approx(0.0, abs=1e-16)
    assert value(n, 0.0) == 0.0
    assert value(n, 1.0) == 0.0


def test_a_third_is_the_best_rate():
    grid = np.linspace(0.0, 1.0, 3001)
    worth = grid * (1 - grid) ** 2
    assert grid[worth.argmax()] == pytest.approx(1 / 3)
    assert value(10_000, 1 / 3) == pytest.approx(0.148148, abs=5e-7)


def test_rollouts_until_both_outcomes_are_the_numbers_worked_out_by_hand():
    confident = [confident_rollouts(p) for p in (0.01, 0.1, 0.5)]
    assert confident == pytest.approx([229.105, 21.854, 3.322], abs=5e-4)


@pytest.mark.parametrize(
    ("success_rates", "total", "budgets", "worth"),
    [
        ([0.1, 0.3, 0.5, 0.9], 32, [14, 9, 7, 2], 0.3282018),
        ([0.05, 0.2, 0.5, 0.95], 32, [10, 13, 7, 2], 0.2623426),
        ([0.25, 0.5], 12, [7, 5], None),
    ],
)
def test_allocations_are_those_worked_out_by_hand(
    success_rates: list[float], total: int, budgets: list[int], worth: float | None
):
    assert allocate(success_rates, total) == budgets
    if worth is not None:
        assert sum(map(value, budgets, success_rates)) == pytest.approx(worth, abs=5e-8)
    assert sum(value(8, p) for p in [0.1, 0.3, 0.5, 0.9]) == pytest.approx(0.3137975, abs=5e-8)


def best_by_dynamic_programming(success_rates: Sequence[float], total: int, low: int, high: int) -> float:
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    for p in success_rates:
        following = np.full(total + 1, -np.inf)
        for n in range(low, min(high, total) + 1):
            following[n:] = np.maximum(following[n:], best[: total + 1 - n] + value(n, p))
        best = following
    return float(best[total])


def test_no_allocation_is_worth_more_by_dynamic_programming_on_a_thousand_instances():
    draw = random.Random(0)
    for _ in range(1000):
        success_rates = [draw.random() for _ in range(draw.randint(1, 6))]
        low = draw.randint(1, 3)
        high = draw.randint(low, 16)
        total = draw.randint(low * len(success_rates), high * len(success_rates))
        worth = sum(map(value, allocate(success_rates, total, low, high), success_rates))
        assert worth == pytest.approx(best_by_dynamic_programming(success_rates, total, low, high), abs=1e-12)


@given(problems())
def test_the_sum_is_the_total_and_the_bounds_hold(problem: tuple[list[float | None], int, int, int]):
    success_rates, total, low, high = problem
    budgets = allocate(success_rates, total, low, high)
    assert sum(budgets) == total
    assert all(low <= n <= high for n in budgets)


@given(problems(), st.integers(0, 2**32))
def test_prompts_in_another_order_get_the_same(problem: tuple[list[float | None], int, int, int], seed: int):
    success_rates, total, low, high = problem
    order = list(range(len(success_rates)))
    random.Random(seed).shuffle(order)
    shuffled = [success_rates[i] for i in order]
    before = Counter(zip(map(str, success_rates), allocate(success_rates, total, low, high), strict=True))
    after = Counter(zip(map(str, shuffled), allocate(shuffled, total, low, high), strict=True))
    assert before == after


@given(problems())
def test_among_equal_prompts_the_earlier_gets_at_most_one_more(
    problem: tuple[list[float | None], int, int, int],
):
    success_rates, total, low, high = problem
    budgets = allocate(success_rates, total, low, high)
    for p in set(success_rates):
        same = [n for n, q in zip(budgets, success_rates, strict=True) if p == q]
        assert all(first - second in (0, 1) for first, second in pairwise(same))
        assert same[0] - same[-1] in (0, 1)


@given(st.lists(st.one_of(mixed_rates, st.sampled_from([0.0, 1.0])), min_size=1, max_size=10), st.data())
def test_more_budget_never_takes_a_rollout_from_anyone(success_rates: list[float], data: st.DataObject):
    total = data.draw(st.integers(2 * len(success_rates), 12 * len(success_rates) - 1))
    less = allocate(success_rates, total, high=12)
    more = allocate(success_rates, total + 1, high=12)
    assert all(a <= b for a, b in zip(less, more, strict=True))


def test_what_mixed_prompts_do_not_need_explores_those_that_always_failed():
    # 0.5 shows both outcomes with probability 0.9 after 4 rollouts; the others explore
    assert allocate([0.5, 0.0, 0.0, 1.0], 32) == [4, 13, 13, 2]
    # until they do have enough, they come first
    assert allocate([0.1, 0.0, 1.0], 24) == [20, 2, 2]


def test_without_failed_prompts_the_mixed_ones_keep_everything():
    assert allocate([0.5, 0.5, 1.0], 24) == [11, 11, 2]


def test_when_all_are_solved_the_share_is_uniform():
    assert allocate([1.0] * 4, 33) == [9, 8, 8, 8]
    assert allocate([None] * 4, 33) == [9, 8, 8, 8]


def test_when_none_is_solved_the_share_is_uniform():
    assert allocate([0.0] * 4, 32) == [8, 8, 8, 8]
    assert allocate([0.0, 1.0, 0.0, 1.0], 32) == [14, 2, 14, 2]


def test_an_unseen_prompt_gets_the_uniform_share():
    assert allocate([None, 0.5, 0.3, 1.0], 32)[0] == 8
    assert allocate([None, 0.5, 0.3, 1.0], 32, unknown=4)[0] == 4


def test_what_solved_prompts_give_up_goes_to_unseen_ones_when_nobody_else_is_there():
    assert allocate([None, 1.0], 16) == [14, 2]


@pytest.mark.parametrize("p", [None, 0.0, 0.3, 1.0])
def test_a_single_prompt_gets_all(p: float | None):
    assert allocate([p], 17) == [17]


def test_the_bounds_may_leave_no_choice():
    assert allocate([0.1, 0.9, None, 0.0, 1.0], 10) == [2] * 5
    assert allocate([0.1, 0.9, None, 0.0, 1.0], 20, high=4) == [4] * 5
    assert allocate([0.1, 0.9], 6, low=3, high=3) == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], 3), "2 prompts with 2..128 rollouts each take a total of 4..256, got 3"),
        (([0.5, 0.5], 300), "2 prompts with 2..128 rollouts each take a total of 4..256, got 300"),
        (([], 0), "0 prompts with 2..128 rollouts each take a total of 0..0, got 0"),
        (([0.5], 8, 0), "needs 1 <= low <= high, got low 0, high 128"),
        (([0.5], 8, 4, 3), "needs 1 <= low <= high, got low 4, high 3"),
        (([0.5, 1.5], 8), "must lie in 0..1 or be None, got 1.5 for prompt 1"),
        (
            ([None, 0.5], 8, 2, 128, 7),
            "leave 2 rollouts for each of the other prompts, got 7 for 1 of 2 prompts",
        ),
        (([None, 0.5], 8, 2, 128, 1), "unknown must lie in 2..128"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(arguments: tuple[list[float | None], int], message: str):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


@given(st.lists(mixed_rates, min_size=1, max_size=8), st.integers(0, 60))
def test_at_equal_costs_tokens_are_rollouts(success_rates: list[float], extra: int):
    total = min(2 * len(success_rates) + extra, 16 * len(success_rates))
    # whole tokens, so that a sum of costs is exact
    by_tokens = allocate_tokens(success_rates, [3.0] * len(success_rates), 3.0 * total, high=16)
    assert by_tokens == allocate(success_rates, total, high=16)


@settings(max_examples=50)
@given(st.lists(st.tuples(mixed_rates, st.integers(1, 50)), min_size=1, max_size=8), st.integers(0, 500))
def test_a_token_budget_is_kept_and_nearly_used_up(prompts: list[tuple[float, int]], extra: int):
    success_rates, costs = [p for p, _ in prompts], [float(c) for _, c in prompts]
    total = 2 * sum(costs) + extra
    budgets = allocate_tokens(success_rates, costs, total, high=20)
    spent = sum(n * c for n, c in zip(budgets, costs, strict=True))
    assert all(2 <= n <= 20 for n in budgets)
    assert spent <= total
    assert spent > total - max(costs) or all(n == 20 for n in budgets)


def test_of_two_equal_prompts_the_cheaper_gets_more():
    cheap, dear = allocate_tokens([0.3, 0.3], [100.0, 400.0], 4000.0)
    assert cheap > dear


def test_a_token_budget_too_small_is_refused():
    with pytest.raises(ValueError, match="1000 tokens at the least, total 900"):
        allocate_tokens([0.3, 0.3], [100.0, 400.0], 900.0)


def test_a_prompt_is_known_from_eight_rewards_on():
    tracker = SuccessTracker()
    assert tracker.rate("a") is None
    tracker.update("a", [1.0, 0.0, -1.0, 0.0])
    assert tracker.rate("a") is None
    tracker.update("a", [1.0, 1.0, 1.0, 0.0])
    assert tracker.rate("a") == 0.5


def test_the_rate_is_that_of_the_last_sixteen_or_of_the_last_visit():
    tracker = SuccessTracker()
    tracker.update("a", [0.0] * 8)
    tracker.update("a", [1.0] * 8)
    assert tracker.rate("a") == 0.5
    tracker.update("a", [1.0] * 8)
    assert tracker.rate("a") == 1.0
    tracker.update("a", [0.0] * 30 + [1.0] * 10)
    assert tracker.rate("a") == 0.25


def test_a_prior_gives_a_rate_from_the_first_reward_on_and_never_a_sure_one():
    tracker = SuccessTracker(prior=(1.0, 1.0))
    assert tracker.rate("a") is None
    tracker.update("a", [0.0, 0.0])
    assert tracker.rate("a") == 0.25
    tracker.update("a", [0.0] * 14)
    assert tracker.rate("a") == 1 / 18


def test_a_tracker_survives_json():
    tracker, other = SuccessTracker(), SuccessTracker()
    tracker.update("train.jsonl:1", [1.0, 0.0] * 5)
    tracker.update("train.jsonl:2", [])
    other.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert other.rate("train.jsonl:1") == tracker.rate("train.jsonl:1") == 0.5
    other.update("train.jsonl:1", [1.0])
    assert tracker.rate("train.jsonl:1") == 0.5


def test_a_damaged_history_is_refused():
    with pytest.raises(ValueError, match="success history of 'a' must be a string of 0 and 1, got '012'"):
        SuccessTracker().load_state_dict({"a": "012"})
    with pytest.raises(ValueError, match="needs 1 <= minimum <= window, got minimum 20, window 16"):
        SuccessTracker(minimum=20)


def test_metrics_say_what_the_rollouts_were_good_for():
    # rates 0, 1/6, 1/2, 4/5 and 1; one missing reward; group 2 has nobody
    groups = [[0.0] * 3, [1.0, *[0.0] * 5], [], [1.0, 0.0, float("nan")], [1.0] * 4 + [0.0], [1.0] * 2]
    rewards = torch.tensor([r for g in groups for r in g])
    group = torch.tensor([i for i, g in enumerate(groups) for _ in g])
    metrics = budget_metrics(rewards, group)
    assert metrics["budget/effective_ratio"].value == pytest.approx((6 + 2 + 5) / 18)
    assert metrics["budget/effective_prompts"].value == pytest.approx(3 / 5)
    assert metrics["budget/largest"].value == 6
    for name in ("0", "0_20", "20_80", "80_100", "100"):
        assert metrics[f"budget/solved_{name}"].value == pytest.approx(1 / 5), name


def test_metrics_of_steps_add_up():
    first = budget_metrics(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    second = budget_metrics(torch.zeros(6), torch.zeros(6, dtype=torch.long))
    assert (first["budget/effective_ratio"] + second["budget/effective_ratio"]).value == 0.25  # type: ignore[operator]
