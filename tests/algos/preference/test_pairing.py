"""Which completions of a group are compared: rules, labels and what is left out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from rlhf.algos.preference.pairing import (
    LABELS,
    RULES,
    Comparison,
    Scored,
    adjusted,
    compare_group,
    win_rates,
)
from rlhf.types import Source

REWARDS = (0.1, 0.9, 0.5, 0.2)


def scored(
    *rewards: float | None, duels: dict[tuple[int, int], float] | None = None, draw: int = 0
) -> Scored:
    return Scored(
        rewards=rewards,
        tokens=[1] * len(rewards),
        truncated=[False] * len(rewards),
        duels=duels or {},
        draw=draw,
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("best_worst", [(1, 0)]),
        ("best_second", [(1, 2)]),
        ("first_two", [(1, 0)]),
        ("all", [(1, 2), (1, 3), (1, 0), (2, 3), (2, 0), (3, 0)]),
    ],
)
def test_a_rule_picks_by_reward_with_the_better_one_first(rule: str, expected: list[tuple[int, int]]):
    assert compare_group(scored(*REWARDS), rule=RULES[rule]) == [Comparison(i, j) for i, j in expected]


def test_the_pair_is_oriented_by_the_reward_that_picked_it():
    # rewards .1 .9 .5 .2 less .001 for each of 100 800 100 100 characters
    assert compare_group(scored(0.0, 0.1, 0.4, 0.1)) == [Comparison(2, 0)]


def test_best_random_draws_any_other_one_and_the_same_again():
    def of_draw(draw: int) -> list[Comparison]:
        return compare_group(scored(*REWARDS, draw=draw), rule=RULES["best_random"])

    drawn = [of_draw(draw) for draw in range(300)]
    assert drawn == [of_draw(draw) for draw in range(300)]
    # 300 draws of three others: 100 each, standard deviation 8
    others = Counter(c.other for [c] in drawn)
    assert others.keys() == {0, 2, 3}
    assert all(60 < n < 140 for n in others.values())
    assert {c.better for [c] in drawn} == {1}
    assert compare_group(scored(0.9, 0.1, draw=5), rule=RULES["best_random"]) == [Comparison(0, 1)]


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"of_data", "dno_prct"}))
def test_equal_rewards_are_no_pair_and_neither_is_what_has_no_reward(rule: str):
    assert compare_group(scored(0.5, 0.5, 0.5), rule=RULES[rule]) == []
    assert compare_group(scored(None, None), rule=RULES[rule]) == []
    # one of two was lost: that is no single label
    assert compare_group(scored(1.0, None), rule=RULES[rule]) == []
    assert compare_group(scored(None, 0.2, None, 0.7), rule=RULES[rule]) == [Comparison(3, 1)]


def test_of_equals_at_the_top_the_first_is_taken_and_all_leaves_out_the_tie():
    assert compare_group(scored(0.2, 0.9, 0.9, 0.2)) == [Comparison(1, 0)]
    assert compare_group(scored(0.2, 0.9, 0.9), rule=RULES["best_second"]) == []
    assert compare_group(scored(0.2, 0.9, 0.9), rule=RULES["all"]) == [Comparison(1, 0), Comparison(2, 0)]


def test_a_gap_below_the_least_one_is_no_pair():
    def pairs_of(gap: float) -> list[Comparison]:
        return compare_group(scored(1.0, 0.75, 0.0), rule=RULES["all"], min_gap=gap)

    assert pairs_of(0.25) == [Comparison(0, 1), Comparison(0, 2), Comparison(1, 2)]
    assert pairs_of(0.5) == [Comparison(0, 2), Comparison(1, 2)]
    assert pairs_of(1.5) == []


def test_a_label_by_reward_is_the_sigmoid_of_the_gap():
    # 1 / (1 + e^-.5)
    [comparison] = compare_group(scored(0.3, 0.8), label=LABELS["reward"])
    assert (comparison.better, comparison.other) == (1, 0)
    assert comparison.probability == pytest.approx(0.622459, abs=1e-6)
    assert compare_group(scored(0.0, 2000.0), label=LABELS["reward"]) == [Comparison(1, 0, 1.0)]


def test_a_label_by_preference_is_the_duels_whichever_way_round():
    def labelled(duels: dict[tuple[int, int], float]) -> list[Comparison]:
        return compare_group(scored(0.3, 0.8, duels=duels), label=LABELS["preference"])

    assert labelled({(1, 0): 0.7}) == [Comparison(1, 0, 0.7)]
    assert labelled({(0, 1): 0.25}) == [Comparison(1, 0, 0.75)]
    # (.75 + 1 - .5) / 2
    assert labelled({(1, 0): 0.75, (0, 1): 0.5}) == [Comparison(1, 0, 0.625)]
    # the judge does not agree with the reward: the pair is turned around
    assert labelled({(1, 0): 0.25}) == [Comparison(0, 1, 0.75)]
    assert labelled({(1, 0): 0.5}) == [Comparison(1, 0, 0.5)]
    # the judge failed: no pair, and not 1/2
    assert labelled({}) == []


def test_a_group_of_one_is_a_single_label():
    assert compare_group(scored(1.0)) == [Comparison(0, None, 1.0)]
    assert compare_group(scored(0.25), label=LABELS["reward"], min_gap=1.0) == [Comparison(0, None, 0.25)]
    assert compare_group(scored(None)) == []
    with pytest.raises(ValueError, match=r"from 0 to 1, got 3\.0"):
        compare_group(scored(3.0))


def test_a_rule_of_the_users_own_may_give_its_own_probability():
    def rule(scored: Scored) -> list[Comparison]:
        return [Comparison(2, 1, math.exp(-1))]

    assert compare_group(scored(*REWARDS), rule=rule) == [Comparison(2, 1, math.exp(-1))]


def test_of_data_compares_the_datasets_completions_alone():
    sources = [Source.POLICY, Source.DATA, Source.DATA, Source.ITERATE]
    group = replace(scored(9.0, 0.0, 1.0, -9.0), sources=sources)
    assert compare_group(group, rule=RULES["of_data"]) == [Comparison(2, 1)]
    assert compare_group(replace(group, sources=[Source.POLICY] * 4), rule=RULES["of_data"]) == []


def test_dno_prct_takes_clear_pairs_and_trusts_the_policys_own():
    # scores of 6: a gold completion of 6, own ones of 5 4 3 2 1
    group = replace(scored(6.0, 5.0, 4.0, 3.0, 2.0, 1.0), sources=[Source.DATA] + [Source.POLICY] * 5)
    found = compare_group(group, rule=RULES["dno_prct"])
    # the gold leads by 2 over 4 and below, the 5 by 1 over 4 and below; 4 and less is no better one
    assert {(c.better, c.other) for c in found} == {(0, j) for j in (2, 3, 4, 5)} | {
        (1, j) for j in (2, 3, 4, 5)
    }
    gold = replace(group, sources=[Source.DATA] * 6)
    assert (1, 2) not in {(c.better, c.other) for c in compare_group(gold, rule=RULES["dno_prct"])}


def test_a_length_penalty_decides_who_is_better():
    # .1 .9 .5 .2 less .001 a token: 0 .1 .4 .1
    group = replace(scored(0.1, 0.9, 0.5, 0.2), tokens=[100, 800, 100, 100])
    assert compare_group(group) == [Comparison(1, 0)]
    assert adjusted(group, length_penalty=0.001).rewards == pytest.approx([0.0, 0.1, 0.4, 0.1])
    assert compare_group(adjusted(group, length_penalty=0.001)) == [Comparison(2, 0)]


def test_truncated_completions_are_compared_dropped_or_lose():
    group = replace(
        scored(0.1, 0.9, 0.5, 0.7), truncated=[False, True, False, True], duels={(1, 0): 0.9, (0, 2): 0.3}
    )
    assert compare_group(adjusted(group, truncated="keep")) == [Comparison(1, 0)]
    assert compare_group(adjusted(group, truncated="drop")) == [Comparison(2, 0)]
    lose = adjusted(group, truncated="lose")
    assert compare_group(lose) == [Comparison(2, 1)]
    # whatever a judge or the rewards say of them
    assert compare_group(lose, rule=RULES["all"], label=LABELS["reward"])[0] == Comparison(
        2, 0, expected(0.4)
    )
    assert {
        (c.better, c.other): c.probability for c in compare_group(lose, rule=RULES["all"], label=by_duel)
    } == {(2, 0): 0.7, (2, 1): 1.0, (2, 3): 1.0, (0, 1): 1.0, (0, 3): 1.0}


by_duel = LABELS["preference"]


def expected(gap: float) -> float:
    return 1.0 / (1.0 + math.exp(-gap))


def test_a_win_rate_is_the_mean_over_completions_of_other_sources():
    own, other = Source.POLICY, Source.MIXTURE
    group = replace(scored(1.0, 0.0, 0.5), sources=[own, other, other], duels={(0, 1): 0.9})
    # a judge says .9 for the first pair; rewards say sigmoid(.5) for the second
    rates = win_rates(group)
    assert rates[0] == pytest.approx((0.9 + expected(0.5)) / 2)
    assert rates[1] == pytest.approx(0.1)
    # one source: all others; equal rewards are one half, also when both lost
    same = replace(scored(1.0, 1.0, None), sources=[own] * 3)
    assert win_rates(same) == [0.5, 0.5, None]
    lost = adjusted(replace(same, truncated=[True, True, False]), truncated="lose")
    assert win_rates(lost) == [0.25, 0.25, 1.0]
