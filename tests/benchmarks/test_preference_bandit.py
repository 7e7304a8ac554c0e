"""The bandits of the preference methods, with few steps: what they show within seconds."""

from __future__ import annotations

from benchmarks.preference_bandit import (
    ON_POLICY,
    OVERSHOOT,
    check_on_policy,
    check_overshoot,
    on_policy,
    overshoot,
)


def test_chi_po_stays_nearer_to_the_reference_than_dpo_and_keeps_more_reward():
    found = overshoot(200, seeds=2, arms={name: OVERSHOOT[name] for name in ("dpo", "chi_po", "rpo")})
    assert found["dpo"]["steps"] == [0, 50, 100, 200]
    assert all(check_overshoot(found).values())
    # the same start for all; dpo has left what the data covers
    assert {curve["reward"][0] for curve in found.values()} == {found["dpo"]["reward"][0]}
    assert found["dpo"]["reward"][-1] < found["dpo"]["reward"][0] - 0.3
    # the likelihood of the better completions is an anchor
    assert found["rpo"]["reward"][-1] > found["rpo"]["reward"][0]


def test_pairs_of_the_policy_teach_more_than_pairs_of_the_reference():
    found = on_policy(100, seeds=2, arms={name: ON_POLICY[name] for name in ("dpo", "sft")})
    assert all(check_on_policy(found).values())
    middle = found["45"]
    assert middle["dpo on"][-1] > middle["dpo off"][-1] + 0.25
    assert max(curve[-1] for curve in found["20"].values()) < 0.01
