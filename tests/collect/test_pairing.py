"""Which label a pair gets when a judge has compared the completions of a group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf.algos.preference.table import dpo
from rlhf.collect.pairing import Pairing
from rlhf.config.pairs import PairsConfig
from rlhf.types import Duel, Group
from tests.support import group


def judged(*rewards: float | None, objective: str, duels: tuple[Duel, ...]) -> Group:
    made = group("say:", [5], [[6 + i] for i in range(len(rewards))], list(rewards))
    objectives: list[dict[str, float]] = [{} if reward is None else {objective: reward} for reward in rewards]
    trajectories = [replace(t, objectives=o) for t, o in zip(made.trajectories, objectives, strict=True)]
    return replace(made, trajectories=tuple(trajectories), duels=duels)


def paired(of: Group, **section: Any) -> tuple[Duel, ...]:
    groups, _ = Pairing(PairsConfig(**section), dpo(), win_rate="judge")([of])
    return groups[0].duels if groups else ()


# 0 beats 1 by .8, 0 beats 2 by .6, 1 beats 2 by .3: win rates .7 .25 .55
DUELS = (Duel(0, 1, 0.8), Duel(0, 2, 0.6), Duel(1, 2, 0.3))


def test_win_rates_decide_the_pair_with_a_label_that_is_certain_or_the_judges():
    one = judged(0.7, 0.25, 0.55, objective="judge", duels=DUELS)
    assert paired(one) == paired(one, labels="hard") == (Duel(0, 1, 1.0),)
    assert paired(one, labels="preference") == (Duel(0, 1, 0.8),)


def test_beside_other_rewards_the_judge_may_turn_the_pair_around():
    # the reward says 1 over 2, the judge 2 over 1 with 1 - .3
    one = judged(0.5, 0.9, 0.1, objective="reward", duels=DUELS)
    (duel,) = paired(one, labels="preference")
    assert (duel.first, duel.second, round(duel.probability, 12)) == (1, 0, 0.7)
    # these two are left, and numbered 0 and 1
    assert [t.reward for t in Pairing(PairsConfig(), dpo())([one])[0][0].trajectories] == [0.9, 0.1]


def test_a_pair_that_the_judge_did_not_judge_is_left_out():
    one = judged(0.5, 0.9, 0.1, objective="reward", duels=DUELS[:2])
    assert paired(one, labels="preference") == ()
    tie = judged(0.5, 0.5, objective="judge", duels=(Duel(0, 1, 0.5),))
    assert paired(tie) == paired(tie, labels="preference") == ()
