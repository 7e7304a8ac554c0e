"""Goals of conversations: segmentation, rates and root causes by hand; judges, scripted and asked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.commands.goals import conversations_of, goal_judges, report_goals
from rlhf.config.section import ConfigError
from rlhf.evaluation.goals import Goal, causes, goals_of, judge_goals, of_several_turns, success_rate
from rlhf.rewards.judges.goals import (
    CODES,
    GoalJudge,
    GoalReward,
    Message,
    TurnVerdict,
    majority,
    read_judge,
    turns_of,
    written,
)
from rlhf.rewards.remote import NoVerdict
from rlhf.rewards.workers.pool import RewardError
from rlhf.rewards.workers.return_values import WrongReturn
from rlhf.types import Group, Prompt
from tests.rewards import test_remote
from tests.rewards.test_remote import Service, serving
from tests.support import trajectory

GOOD, MORE = TurnVerdict(True, True), TurnVerdict(False, True)


def failed(code: str | None, *, new_goal: bool = False) -> TurnVerdict:
    return TurnVerdict(new_goal, False, code)


def talk(*texts: str) -> list[Message]:
    """A conversation of one question and one answer a turn."""
    roles = [{"role": "user"}, {"role": "assistant"}]
    return [
        {**role, "content": f"{text}{mark}"} for text in texts for role, mark in zip(roles, "?.", strict=True)
    ]


def test_a_goal_is_a_run_of_turns_and_fails_with_its_first_failure():
    # turns yes, no, yes; success, failure, success
    goals = goals_of([GOOD, failed("E4"), GOOD])
    assert goals == [Goal(1, 2, False, "E4"), Goal(3, 3, True)]
    assert success_rate(goals) == 100 * 1 / 2
    assert success_rate(of_several_turns(goals)) == 100 * 0 / 1
    # both turns failed: the code of the first
    assert goals_of([failed("E1", new_goal=True), failed("E4"), GOOD])[0] == Goal(1, 2, False, "E1")
    # the first turn begins a goal, whatever is said of it
    assert goals_of([MORE, MORE]) == [Goal(1, 2, True)]
    assert goals_of([]) == [] and success_rate([]) == 0.0


def test_the_rates_and_causes_of_the_paper():
    # 1,915 goals, 1,488 reached; of 427 failures E4 164, E1 116, E3 70, E5 43, E2 17, and 17 others
    counts = {"E4": 164, "E1": 116, "E3": 70, "E5": 43, "E2": 17, None: 17}
    goals = [Goal(1, 1, True)] * 1488
    goals += [Goal(1, 1, False, code) for code, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(goals)
    assert len(goals) == 1915 and round(success_rate(goals), 4) == 77.7023
    assert list(causes(goals).items()) == list(counts.items())


def test_a_turn_is_what_is_said_between_two_messages_of_the_user():
    conversation = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "zoom"}]},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Thanks"},
    ]
    assert [len(turn) for turn in turns_of(conversation)] == [5, 1]
    assert turns_of(conversation[:1]) == []
    assert written(turns_of(conversation)) == (
        'Turn 1\nuser: Hello\nuser: [image] what is it?\nassistant: [calls {"name": "zoom"}]\n'
        "tool: a cat\nassistant: A cat.\n\nTurn 2\nuser: Thanks"
    )


def test_the_majority_decides_on_each_turn_and_its_code():
    votes = [[GOOD, failed("E4")], [GOOD, failed("E4", new_goal=True)], [MORE, failed("E1")]]
    assert majority(votes) == [GOOD, failed("E4")]
    # two of three see a failure and disagree about its cause
    assert majority([[failed("E1")], [failed("E2")], [MORE]]) == [failed(None)]
    assert majority([[GOOD], [failed("E2", new_goal=True)]]) is None
    assert majority([[], []]) == []


def planted(seed: int) -> tuple[list[list[Message]], list[list[TurnVerdict]]]:
    """Conversations, and what is right about their turns; the k-th text of all is found by its number."""
    rng = random.Random(seed)
    truth: list[list[TurnVerdict]] = []
    for _ in range(rng.randint(3, 8)):
        truth.append([])
        for _ in range(rng.randint(1, 6)):
            code = rng.choice([None, None, *CODES])
            truth[-1].append(TurnVerdict(rng.random() < 0.5, code is None, code))
    return [talk(*(f"{i} {k}" for k in range(len(turns)))) for i, turns in enumerate(truth)], truth


@pytest.mark.parametrize("seed", range(3))
def test_planted_failures_are_found_exactly(seed: int):
    conversations, truth = planted(seed)

    def scripted(given: Sequence[Sequence[Message]]) -> list[list[dict[str, Any]]]:
        places = [int(c[0]["content"].split()[0]) for c in given]
        return [
            [{"new_goal": v.new_goal, "success": v.success, "code": v.code} for v in truth[i]] for i in places
        ]

    def wrong(given: Sequence[Sequence[Message]]) -> list[list[dict[str, Any]]]:
        return [[{"new_goal": True, "success": False, "code": "E5"} for _ in turns_of(c)] for c in given]

    one, three = scripted, [read_judge(f) for f in (wrong, scripted, scripted)]
    report = judge_goals(conversations, three)
    assert report == judge_goals(conversations, [read_judge(one)])
    # counted without the functions under test: a goal is what follows a turn that begins one
    reached, goals, first = 0, 0, dict[str | None, int]()
    for turns in truth:
        code: str | None = None
        for k, verdict in enumerate([*turns, None]):
            if k and (verdict is None or verdict.new_goal):
                goals, reached = goals + 1, reached + (code is None)
                if code is not None:
                    first[code] = first.get(code, 0) + 1
                code = None
            if verdict is not None and code is None:
                code = verdict.code
    assert (len(report.goals), sum(g.success for g in report.goals)) == (goals, reached)
    assert causes(report.goals) == first and report.left_out == 0
    assert (
        next(report.lines()) == f"goals        {reached} of {goals} reached: GSR {100 * reached / goals:.1f}%"
    )


def test_what_no_judge_could_judge_is_left_out_and_counted():
    def judge(given: Sequence[Sequence[Message]]) -> list[Any]:
        return [None if c[0]["content"] == "b?" else [{"success": True}] for c in given]

    report = judge_goals([talk("a"), talk("b")], [read_judge(judge)])
    assert report.conversations == ((Goal(1, 1, True),), None)
    assert list(report.lines()) == [
        "goals        1 of 1 reached: GSR 100.0%",
        "             0 of several turns: GSR 0.0%",
        "left out     1 of 2 conversations without a verdict",
    ]
    figures = report.figures()
    assert figures["conversations"] == [[{"first": 1, "last": 1, "success": True, "code": None}], None]
    assert (figures["goals"], figures["success_rate"], figures["left_out"]) == (1, 100.0, 1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (7, "must return a list of 1 lists, one a conversation, got int"),
        ([[{"success": True}] * 2], "2 verdicts on 1 turns"),
        ([[{"new_goal": "no"}]], "no word on whether turn 1 is a success or a failure"),
        ([["yes"]], "a verdict on a turn is an object, got 'yes'"),
        ([[{"turn": 2, "success": True}]], r"verdicts on turns \[2\], where there are 1"),
    ],
)
def test_a_function_that_returns_something_else_is_told_what_was_expected(returned: Any, message: str):
    with pytest.raises(WrongReturn, match=message):
        judge_goals([talk("a")], [read_judge(lambda conversations: returned)])


TWO = [
    {"turn_number": 2, "is_new_goal": "No", "quality": "failure", "rcof": "E4: nothing found"},
    {"turn_number": 1, "is_new_goal": "yes", "quality": "success", "rcof": None},
]
LINES = "\n".join(json.dumps(entry) for entry in reversed(TWO))
ANSWERS = {
    "list": (f"<think>[1] {{no}}</think>\nTurn 2 fails [sic].\n```json\n{json.dumps(TWO)}\n```", "stop"),
    "lines": (f"Here:\n{LINES}", "stop"),
    "odd": (json.dumps([{"quality": "success"}, {"quality": "failure", "rcof": "E9"}]), "stop"),
    "half": (json.dumps(TWO[:1]), "stop"),
    "unsaid": (json.dumps([{"is_new_goal": "yes"}, {"quality": "failure"}]), "stop"),
    "cut-list": (json.dumps(TWO), "length"),
    "silent": ("I cannot say.", "stop"),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        for name, answer in ANSWERS.items():
            patch.setitem(test_remote.JUDGED, name, answer)
        yield server


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("list", [GOOD, failed("E4")]),
        ("lines", [GOOD, failed("E4")]),
        # nothing is said of new goals, and there is no E9
        ("odd", [GOOD, failed(None, new_goal=True)]),
        *((answer, None) for answer in ("half", "unsaid", "cut-list", "silent")),
    ],
)
def test_a_model_is_asked_and_its_answer_read(
    service: Service, answer: str, verdicts: list[TurnVerdict] | None
):
    service.requests.clear()
    judge = GoalJudge(service.url(answer), "m", temperature=0.7, sample=5)
    assert judge([talk("a", "b"), []]) == [verdicts, []]
    [(_, _, sent)] = service.requests
    assert (sent["seed"], sent["temperature"], sent["max_tokens"]) == (5, 0.7, 4096)
    [message] = sent["messages"]
    assert written(turns_of(talk("a", "b"))) in message["content"]
    assert "has 2 turns" in message["content"] and all(code in message["content"] for code in CODES)


def test_the_reward_of_an_episode_is_whether_no_turn_failed(service: Service):
    reward = GoalReward(service.url("list"), "m")
    episode = [*talk("a", "b")[1:]]
    assert reward(["a?"], [episode], environments=[None]) == [0.0]
    chat = [{"role": "user", "content": "a?"}]
    assert GoalReward(service.url("lines"), "m", template="{conversation}")([chat], [episode]) == [0.0]
    with pytest.raises(NoVerdict, match="1 verdicts on 2 turns"):
        GoalReward(service.url("half"), "m")(["a?"], [episode])
    with pytest.raises(ValueError, match=r"template must have \{conversation\}"):
        GoalJudge("http://x", "m", template="{prompt}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{url: 'http://x', model: m, votes: 3}", "votes of one model are the same at temperature 0"),
        ("{url: 'http://x', model: m, votes: 0}", "votes must be a whole number, at least 1, got 0"),
        ("{url: 'http://x'}", "missing a required argument: 'model'"),
        ("{url: x, model: m}", "expected an address like http://host:8000/score, got 'x"),
        ("nobody", "expected package.module:name or path/file.py:name, got 'nobody'"),
        ("{url: ", "neither my.py:judge nor YAML"),
    ],
)
def test_judges_that_cannot_be_asked_are_refused(spec: str, message: str):
    with pytest.raises(ConfigError, match=message):
        goal_judges(spec)


def test_each_vote_of_a_model_is_a_sample_of_its_own(service: Service):
    service.requests.clear()
    judges = goal_judges(json.dumps({"url": service.url("list"), "model": "m", "votes": 3, "temperature": 1}))
    report = judge_goals([talk("a", "b")], judges)
    assert report.conversations == ((Goal(1, 2, False, "E4"),),)
    assert [sent["seed"] for _, _, sent in service.requests] == [0, 1, 2]


def test_samples_are_judged_as_conversations(tmp_path: Path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a?"}]
    several = replace(trajectory([5], 1.0), messages=tuple(talk("x", "b")[1:]))
    one = replace(trajectory([6], 1.0), text="yes")
    groups = [Group(Prompt("p", (3,), chat), (several,)), Group(Prompt("q", (4,), "c?"), (one,))]
    conversations = conversations_of(groups)
    assert [len(turns_of(c)) for c in conversations] == [2, 1]
    assert conversations[1] == [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "my.py").write_text(
        "def judge(conversations):\n"
        "    asked = [[m['content'] for m in c if m['role'] == 'user'] for c in conversations]\n"
        "    return [[{'success': text != 'b?'} for text in texts] for texts in asked]\n"
        "def broken(conversations):\n    return 1\n"
    )
    report = report_goals(groups, goal_judges(f"{tmp_path}/my.py:judge"))
    assert [goal.success for goal in report.goals] == [True, False, True]
    with pytest.raises(RewardError, match="--goals: must return a list of 2 lists"):
        report_goals(groups, goal_judges(f"{tmp_path}/my.py:broken"))
