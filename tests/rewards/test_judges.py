"""Judges of pairs in real workers: what is asked, what an answer means, what becomes of a failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.metrics import Metrics
from rlhf.rewards.judges.duels import Asking, DuelBatch, Verdicts, duel_metrics
from rlhf.rewards.judges.judged import JudgedRewards
from rlhf.rewards.judges.plugin import JudgeSpec, load_judge, read_verdicts
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.workers.batch import Batch
from rlhf.rewards.workers.pool import RewardError
from rlhf.rewards.workers.return_values import WrongReturn
from rlhf.rollout.episode import Episode, Observation
from rlhf.types import Completion, Duel, FinishReason, Group, Prompt, VersionSpan
from tests.rewards.test_scoring import completions_of, prompt

MINE = str(Path(__file__).with_name("my_judges.py"))
FUNCTIONS = str(Path(__file__).with_name("my_rewards.py"))
BOTH = Asking(first_two=False, both_orders=True)
ONCE = Asking(first_two=False, both_orders=False)


@contextmanager
def judged(
    name: str,
    asking: Asking = BOTH,
    functions: Sequence[RewardSpec] = (),
    columns: Sequence[str] = (),
    max_failed_share: float = 0.1,
    **settings: Any,
) -> Iterator[JudgedRewards]:
    path = name if name.startswith("pair_") else f"{MINE}:{name}"
    spec = JudgeSpec(path, **({"workers": 1, "timeout": 60.0} | settings))
    rewards = JudgedRewards(functions, columns, spec, asking, max_failed_share=max_failed_share)
    try:
        yield rewards
    finally:
        rewards.close()


def score(
    rewards: JudgedRewards, *texts: Sequence[str], prompts: Sequence[Prompt] = ()
) -> tuple[list[Group], Metrics]:
    """Scores groups of completions with one token a character."""
    of = prompts or [prompt(i) for i in range(len(texts))]
    return rewards.score(of, completions_of(of, texts), texts, trainer_state={"global_step": 7})


def rewards_of(group: Group) -> list[float | None]:
    return [t.reward for t in group.trajectories]


def known(duels: Sequence[Duel]) -> dict[tuple[int, int], float]:
    return {(d.first, d.second): round(d.probability, 12) for d in duels}


def values(metrics: Metrics) -> dict[str, float]:
    return {name: m.value for name, m in metrics.items() if name.startswith("duels/")}


def test_an_answer_is_a_probability_or_an_index_and_never_a_bool() -> None:
    import numpy as np
    import torch

    assert read_verdicts([0.25, 0, 1, -1, None, 1.0], 6) == [0.25, 1.0, 0.0, None, None, 1.0]
    assert read_verdicts(np.array([0, 1]), 2) == read_verdicts(torch.tensor([0, 1]), 2) == [1.0, 0.0]
    assert read_verdicts((np.int64(1), np.float64(1.0), torch.tensor(1)), 3) == [0.0, 1.0, 0.0]
    for wrong, said in (
        ([True], "could mean either"),
        ([np.bool_(False)], "could mean either"),
        ([2], "-1 none; got 2"),
        ([1.5], r"between 0 and 1, got 1\.5"),
        (["A"], "got str 'A'"),
        ([0.5, 0.5], "must return 1 verdicts, one a pair, got 2"),
        (0.5, "a list of 1 verdicts"),
    ):
        with pytest.raises(WrongReturn, match=said):
            read_verdicts(wrong, 1)


def test_both_orders_are_averaged_and_equal_answers_are_exactly_a_tie() -> None:
    # (.7778 + 1 - .4) / 2
    assert known(Verdicts.of([(0, 1), (1, 0)], [0.7778, 0.4]).duels) == {(0, 1): 0.6889}
    assert Verdicts.of([(0, 1), (1, 0)], [0.9, 0.9]).win_rates(2) == [0.5, 0.5]
    assert known(Verdicts.of([(0, 1)], [0.9]).duels) == {(0, 1): 0.9}


def test_a_duel_with_one_order_unknown_is_left_out() -> None:
    half = Verdicts.of([(0, 1), (1, 0), (0, 2), (2, 0)], [0.9, None, 0.2, 0.9])
    assert known(half.duels) == {(0, 2): 0.15}
    assert half.win_rates(3) == [pytest.approx(0.15), None, pytest.approx(0.85)]
    assert (half.asked, half.first, half.disagree) == (2, (1.0, 0.0, 1.0), (False,))


def test_win_rates_of_three_completions() -> None:
    # 0 beats 1 by .8, 0 beats 2 by .6, 1 beats 2 by .3
    found = Verdicts.of([(0, 1), (0, 2), (1, 2)], [0.8, 0.6, 0.3])
    # (.8 + .6) / 2, (.2 + .3) / 2, (.4 + .7) / 2
    assert found.win_rates(3) == pytest.approx([0.7, 0.25, 0.55])
    circle = Verdicts.of([(0, 1), (1, 2), (0, 2)], [0.7, 0.7, 0.3])
    assert circle.win_rates(3) == pytest.approx([0.5, 0.5, 0.5])


def test_metrics_are_sums_and_counts() -> None:
    one = Verdicts.of([(0, 1), (1, 0)], [0.9, 0.8])
    two = Verdicts.of([(0, 1), (1, 0), (0, 2), (2, 0)], [0.9, None, 0.5, 0.2])
    # duels: 3 asked, 1 unknown; of 2 known one disagrees; of 5 comparisons 3 and a half are won by the first
    assert values(duel_metrics([one, two])) == {
        "duels/asked": 3.0,
        "duels/failed": pytest.approx(1 / 3),
        "duels/disagree": 0.5,
        "duels/first": 0.7,
    }


def test_what_is_asked_is_what_the_rule_needs_without_equal_completions() -> None:
    def places(asking: Asking, *texts: str) -> list[tuple[int, int]]:
        of = [prompt(1)]
        return DuelBatch.asked(Batch.of(of, completions_of(of, [texts]), [texts]), asking).places

    assert places(ONCE, "a", "b", "c") == [(0, 1), (0, 2), (1, 2)]
    assert places(BOTH, "a", "b") == [(0, 1), (1, 0)]
    assert places(ONCE, "a", "b", "a") == [(0, 1), (1, 2)]
    first_two = Asking(first_two=True, both_orders=True)
    assert places(first_two, "a", "b", "c") == [(0, 1), (1, 0)]
    assert places(first_two, "a", "a", "c") == places(BOTH, "a") == places(BOTH) == []
    # 4 x 3 / 2 duels; for the first two alone 1
    assert (ONCE.calls(4), BOTH.calls(4), first_two.calls(4), BOTH.calls(1)) == (6, 12, 2, 0)


def test_duels_and_win_rates_come_with_the_groups() -> None:
    with judged("looked_up") as rewards:
        (group, lone), metrics = score(rewards, ["a", "b"], ["c"])
    assert known(group.duels) == {(0, 1): 0.6889}
    assert rewards_of(group) == pytest.approx([0.6889, 0.3111])
    assert group.trajectories[0].objectives == {"looked_up": pytest.approx(0.6889)}
    assert (lone.duels, rewards_of(lone)) == ((), [None])
    # the first place wins (a, b), the second wins (b, a): both say a
    assert values(metrics) == {
        "duels/asked": 1.0,
        "duels/failed": 0.0,
        "duels/disagree": 0.0,
        "duels/first": 0.5,
    }
    assert metrics["reward/mean"].value == 0.5
    assert metrics["reward/failed/looked_up"].value == 0.0
    restored = group_of(group_state(group), {group.prompt.id: group.prompt})
    assert restored.duels == group.duels


def test_the_same_tokens_are_a_tie_and_are_not_asked() -> None:
    with judged("looked_up") as rewards:
        (three, two), metrics = score(rewards, ["a", "b", "a"], ["c", "c"])
    assert known(three.duels) == {(0, 1): 0.6889, (1, 2): 0.3111, (0, 2): 0.5}
    # (.6889 + .5) / 2 and (.3111 + .3111) / 2
    assert rewards_of(three) == pytest.approx([0.59445, 0.3111, 0.59445])
    assert (two.duels, rewards_of(two)) == ((Duel(0, 1, 0.5),), [0.5, 0.5])
    assert values(metrics) == {
        "duels/asked": 2.0,
        "duels/failed": 0.0,
        "duels/disagree": 0.0,
        "duels/first": 0.5,
    }
    assert metrics["reward/failed"].value == 0.0


def episode(of: Prompt, index: int, said: str, sold: int, lost: str | None = None) -> Episode:
    """Two turns of the policy, the second of which says something else in each episode."""
    tokens = tuple(map(ord, said))
    turn = Completion(of.id, index, (104, 105), (-0.5, -0.5), FinishReason.STOP, (VersionSpan(0, 0, 2),))
    last = replace(turn, token_ids=tokens, rollout_logprobs=(-0.5,) * len(said), versions=())
    return Episode(
        prompt=of,
        index=index,
        turns=(turn, Observation((63,)), last),
        finish_reason=FinishReason.STOP,
        messages=(
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": said},
        ),
        environment="Shop",
        state={"sold": sold},
        lost=lost,
    )


def test_episodes_are_compared_as_conversations_and_lost_ones_have_no_reward(tmp_path: Path) -> None:
    of = prompt(1, [{"role": "user", "content": "Hello."}])
    group = [episode(of, 0, "a", 3), episode(of, 1, "b", 2, lost="it died"), episode(of, 2, "c", 3)]
    group += [episode(of, 3, "d", 1), episode(of, 4, "d", 1)]
    with judged("sold_more", columns=["environments"], max_failed_share=0.2) as rewards:
        rewards.print_to(tmp_path / "log")
        texts = [[e.messages[-1]["content"] for e in group]]
        (found,), metrics = rewards.score([of], [group], texts, trainer_state={})
        with pytest.raises(RewardError, match=r"2 of 5 .*have no reward.*2 episodes were lost .*it died"):
            rewards.score([of], [[*group[:4], replace(group[1], index=4)]], texts, trainer_state={})
    # what a worker prints has all arrived when it has ended
    shape = (tmp_path / "log").read_text().splitlines()[0]
    turns = "['assistant', 'user', 'assistant']"
    assert shape == f"sold_more: [{turns}, {turns}] [3, 3]"
    # 0 ties with 2 and beats 3 and 4: (.5 + 1 + 1) / 3; 3 loses to 0 and 2 and is the same as 4: .5 / 3
    most, least = pytest.approx(2.5 / 3), pytest.approx(0.5 / 3)
    assert rewards_of(found) == [most, None, most, least, least]
    assert {(d.first, d.second) for d in found.duels} == {(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)}
    # all but 3-4, in both orders
    assert values(metrics)["duels/asked"] == 5.0 and values(metrics)["duels/failed"] == 0.0
    assert metrics["turns/lost"].value == metrics["reward/failed"].value == 1 / 5


def test_where_environments_give_rewards_the_duels_change_none() -> None:
    of = prompt(1, [{"role": "user", "content": "Hello."}])
    group = [replace(episode(of, i, text, i), rewards={"Shop": i / 4}) for i, text in enumerate("ab")]
    with judged("sold_more", columns=["environments"]) as rewards:
        rewards.environment_rewards = True
        (found,), _ = rewards.score([of], [group], [["a", "b"]], trainer_state={})
        assert rewards.win_rate is None and rewards.weights == {"Shop": 1.0}
    assert (rewards_of(found), found.duels) == ([0.0, 0.25], (Duel(0, 1, 0.0),))


def test_the_groups_of_a_step_are_submitted_one_by_one_and_gathered_together() -> None:
    with judged("longer", batch=4) as rewards:
        texts = [["a", "bb", "ccc"], ["dd", "d"]]
        of = [prompt(i) for i in range(2)]
        parts = [
            rewards.submit([p], [c], [t], trainer_state={}, step_samples=5)
            for p, c, t in zip(of, completions_of(of, texts), texts, strict=True)
        ]
        groups, _ = rewards.gather(parts)
    # ccc beats both, bb beats one of two
    assert [rewards_of(group) for group in groups] == [[0.0, 0.5, 1.0], [1.0, 0.0]]


def test_a_judge_that_always_names_the_first_ties_every_duel() -> None:
    with judged("first") as rewards:
        (group,), metrics = score(rewards, ["a", "b", "c"])
    assert rewards_of(group) == [0.5, 0.5, 0.5]
    found = values(metrics)
    assert (found["duels/first"], found["duels/disagree"]) == (1.0, 1.0)
    with judged("first", ONCE) as rewards:
        (group,), metrics = score(rewards, ["a", "b"])
    assert rewards_of(group) == pytest.approx([0.9, 0.1])
    assert values(metrics) == {"duels/asked": 1.0, "duels/failed": 0.0, "duels/first": 1.0}


@pytest.mark.parametrize("how", ["hangs", "crashes", "raises", "gives nan"])
def test_a_failure_costs_its_duel_alone(how: str) -> None:
    timeout = 1.0 if how == "hangs" else 60.0
    settings = {"params": {"how": how}, "timeout": timeout, "max_failed_share": 0.5}
    with judged("misbehaves", ONCE, **settings) as rewards:
        (bad, good), metrics = score(rewards, ["a", "xx", "ccc"], ["a", "bb"])
    assert bad.duels == (Duel(0, 2, 0.0),)
    assert rewards_of(bad) == [0.0, None, 1.0]
    assert rewards_of(good) == [0.0, 1.0]
    assert values(metrics)["duels/failed"] == pytest.approx(2 / 4)
    assert metrics["reward/timeout/misbehaves"].value == (0.5 if how == "hangs" else 0.0)


def test_too_many_failures_stop_the_run_and_name_the_judge() -> None:
    said = (
        r"2 of 3 comparisons have no verdict, more than max_failed_share = 0.5: misbehaves failed on 2 .*idea"
    )
    with (
        judged("misbehaves", ONCE, params={"how": "raises"}, max_failed_share=0.5) as rewards,
        pytest.raises(RewardError, match=said),
    ):
        score(rewards, ["a", "xx", "ccc"])
    with (
        judged("says", ONCE, params={"answers": {}}, max_failed_share=0.5) as rewards,
        pytest.raises(RewardError, match=r"1 of 1 comparisons have no verdict.*: the judge gave none \(None"),
    ):
        score(rewards, ["a", "b"])


def test_a_wrong_return_stops_the_run_and_names_the_judge() -> None:
    with (
        judged("refuses") as rewards,
        pytest.raises(RewardError, match=r"judge refuses must return for each pair a float.*could mean ei"),
    ):
        score(rewards, ["a", "b"])


def test_a_verdict_of_none_leaves_its_duel_out() -> None:
    answers = {"ab": 0, "bc": None, "ac": -1}
    with judged("says", ONCE, params={"answers": answers}, max_failed_share=1.0) as rewards:
        (group,), metrics = score(rewards, ["a", "b", "c"])
    assert group.duels == (Duel(0, 1, 1.0),)
    assert rewards_of(group) == [1.0, 0.0, None]
    assert values(metrics)["duels/failed"] == pytest.approx(2 / 3)


def test_beside_reward_functions_the_duels_change_no_reward() -> None:
    function = RewardSpec(f"{FUNCTIONS}:brevity", params={"limit": 2}, workers=1)
    with judged("longer", functions=[function]) as rewards:
        (group,), _ = score(rewards, ["a", "ccc"])
        with rewards.without_judge():
            (unjudged,), metrics = score(rewards, ["a", "ccc"])
    assert (group.duels, rewards_of(group)) == ((Duel(0, 1, 0.0),), [1.0, 0.0])
    assert (unjudged.duels, rewards_of(unjudged), values(metrics)) == ((), [1.0, 0.0], {})
    assert (rewards.win_rate, group.trajectories[0].objectives) == (None, {"brevity": 1.0})


def test_a_judge_gets_two_completions_for_each_prompt(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Why?"}]
    with judged("seen", ONCE, columns=["answer"]) as rewards:
        rewards.print_to(tmp_path / "log")
        score(rewards, ["a", "b"], prompts=[prompt(1, chat, answer=5)])
    two = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    assert (tmp_path / "log").read_text() == f"seen: {[chat]} {[two]} [[[97], [98]]] [5] 7\n"
    with (
        pytest.raises(ValueError, match="judge seen needs columns that the dataset does not have: 'answer'"),
        judged("seen"),
    ):
        pass


def test_judges_of_trl_get_text_and_do_not_shuffle() -> None:
    chat = [{"role": "user", "content": "Why?"}]
    with judged("OfTRL", max_failed_share=1.0) as rewards:
        groups, _ = score(rewards, ["bad", "good"], ["bad", "good"], prompts=[prompt(1, chat), prompt(2)])
    assert [rewards_of(group) for group in groups] == [[0.0, 1.0], [None, None]]


def test_a_coroutine_is_waited_for() -> None:
    with judged("later", ONCE) as rewards:
        (group,), _ = score(rewards, ["a", "b"])
    assert group.duels == (Duel(0, 1, 0.25),)


@pytest.mark.parametrize(
    ("path", "params", "said"),
    [
        (f"{MINE}:P", {}, "must be a function, or a class or object with __call__ or the method judge"),
        (f"{MINE}:longer", {"limit": 3}, "judge .*longer does not take 'limit'"),
        (f"{MINE}:longer", {"prompts": []}, "judge .*longer: 'prompts' is given by the trainer"),
        ("pair_juge", {}, r"no installed package offers a judge 'pair_juge' \(did you mean 'pair_judge'\?\)"),
        ("my_judges.py", {}, "a judge is the file my_judges.py: name a function in it too"),
    ],
)
def test_what_is_no_judge_is_refused(path: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_judge(JudgeSpec(path, params=params))
