"""The benchmark of a reward model's data: its line, rank accuracy and pairs, and how compute is counted."""

from __future__ import annotations

import pytest

from benchmarks.offline_data import Row
from benchmarks.reward_data import draw_pairs, line, rank_accuracy, tokens_of, units
from examples.offline.reward import one

ROW: Row = {"prompt": "use lamp rope gold :", "words": ["lamp", "rope", "gold"]}


def test_the_line_puts_scores_on_the_scale_of_the_true_reward():
    # truth = 0.25 + 0.5 score, and two samples a tenth above and below it
    assert line([-1.0, 1.0, 0.0, 0.0], [-0.25, 0.75, 0.35, 0.15]) == pytest.approx((0.25, 0.5))
    # a model that tells nothing apart says the mean, (0 + 1) / 2
    assert line([2.0, 2.0], [0.0, 1.0]) == (0.5, 0.0)


def test_rank_accuracy_is_of_unequal_samples_of_one_prompt():
    # by truth: (1, .5) and (1, 0) are right, (.5, 0) is a tie of the scores; then both are wrong
    assert rank_accuracy([([0.2, 0.1, 0.1], [1.0, 0.5, 0.0])]) == pytest.approx((1 + 1 + 0.5) / 3)
    assert rank_accuracy([([0.2, 0.3, 0.3], [1.0, 0.5, 0.0])]) == pytest.approx((0 + 0 + 0.5) / 3)
    # samples of different prompts are not compared, nor equal ones
    assert rank_accuracy([([0.9, 0.1], [0.5, 0.5]), ([0.0, 1.0], [0.0, 1.0])]) == 1.0
    assert rank_accuracy([([0.9, 0.1], [0.5, 0.5])]) == 0.5


def test_a_pair_has_unequal_true_rewards_and_a_prompt_without_one_gives_none():
    same = ["a lamp .", "the rope ."]
    mixed = ["a lamp and a rope .", "the lamp .", "", "we saw"]
    pairs = [draw_pairs([(ROW, same), (ROW, mixed)], seed) for seed in range(20)]
    assert all(len(drawn) == 1 for drawn in pairs)
    texts = {(drawn[0]["chosen"], drawn[0]["rejected"]) for drawn in pairs}
    # 2/3 above 1/3 above 0: three pairs, none with the empty completion
    assert texts == {(mixed[0], mixed[1]), (mixed[0], mixed[3]), (mixed[1], mixed[3])}
    assert all(one(a, ROW["words"]) > one(b, ROW["words"]) for a, b in texts)


def test_compute_counts_each_pass_of_each_token():
    # two pairs of 20 tokens together, and 5 of each prompt: 20 + 2 * 5
    assert tokens_of([{"rollout/tokens": 20.0, "rollout/groups": 2.0}], prompt=5) == [30.0]
    # forward and backward 3; DPO's reference 1 more; PPO-max: 5 passes forward and two updates
    assert [units(kind, 30) for kind in ("reward model", "dpo", "ppo_max")] == [90, 120, 330]
