"""How many goals of users were reached in conversations, and why the others were not (GSR and RCOF).

A goal is a run of turns: it begins where the user begins something new, and lasts until the next one begins.
It fails if any of its turns fails, and its root cause is that of the *first* one that failed:

    turn       1        2        3              goals  turns 1 and 2, failed with the code of turn 2
    new goal   yes      no       yes                   turn 3, reached
    quality    success  failure  success        GSR    100 * 1 / 2 = 50; of several turns: 100 * 0 / 1 = 0

Source: Mind the Goal, arXiv:2510.03696. Several judges vote on each turn (the paper has three). Difference
from the paper: a conversation on which votes are tied, or which no judge could judge, is left out and
counted; there it goes to people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rlhf.rewards.judges.goals import CODES, Judge, Message, TurnVerdict, majority


@dataclass(frozen=True, slots=True)
class Goal:
    """Turns `first` to `last` of a conversation, counted from 1; example: `Goal(1, 2, False, "E4")`."""

    first: int
    last: int
    success: bool
    code: str | None = None
    """Root cause of a failure; None: a success, or no code is known."""

    @property
    def turns(self) -> int:
        return self.last - self.first + 1


def goals_of(verdicts: Sequence[TurnVerdict]) -> list[Goal]:
    """The goals of a conversation. Its first turn begins one, whatever the verdict says."""
    starts = [i for i, verdict in enumerate(verdicts) if i == 0 or verdict.new_goal]
    goals: list[Goal] = []
    for start, end in pairwise([*starts, len(verdicts)]):
        failed = next((verdict for verdict in verdicts[start:end] if not verdict.success), None)
        goals.append(Goal(start + 1, end, failed is None, None if failed is None else failed.code))
    return goals


def success_rate(goals: Sequence[Goal]) -> float:
    """GSR, in percent: 100 * goals reached / goals; 0 where there are none, as in the paper's code."""
    return 100.0 * sum(goal.success for goal in goals) / len(goals) if goals else 0.0


def of_several_turns(goals: Sequence[Goal]) -> list[Goal]:
    """Goals of two turns and more, of which the multi-turn GSR is the rate."""
    return [goal for goal in goals if goal.turns >= 2]


def causes(goals: Sequence[Goal]) -> dict[str | None, int]:
    """The number of failed goals with each root cause, the most frequent first; None: no code is known."""
    failed = Counter(goal.code for goal in goals if not goal.success)
    return dict(sorted(failed.items(), key=lambda item: (-item[1], item[0] or "F")))


@dataclass(frozen=True, slots=True)
class GoalReport:
    """The goals of each conversation, in order; None where there is no majority verdict."""

    conversations: tuple[tuple[Goal, ...] | None, ...]

    @property
    def goals(self) -> list[Goal]:
        return [goal for goals in self.conversations if goals is not None for goal in goals]

    @property
    def left_out(self) -> int:
        """Conversations without a verdict."""
        return sum(goals is None for goals in self.conversations)

    def figures(self) -> dict[str, Any]:
        """The figures, and the goals of each conversation, as JSON has them."""
        goals = self.goals
        return {
            "goals": len(goals),
            "success_rate": success_rate(goals),
            "success_rate_of_several_turns": success_rate(of_several_turns(goals)),
            "causes": {code or "unknown": count for code, count in causes(goals).items()},
            "left_out": self.left_out,
            "conversations": [
                None if c is None else [asdict(goal) for goal in c] for c in self.conversations
            ],
        }

    def lines(self) -> Iterator[str]:
        """The figures for people."""
        goals = self.goals
        several = of_several_turns(goals)
        reached = sum(goal.success for goal in goals)
        yield f"goals        {reached} of {len(goals)} reached: GSR {success_rate(goals):.1f}%"
        yield f"             {len(several)} of several turns: GSR {success_rate(several):.1f}%"
        for code, count in causes(goals).items():
            meaning = "no code" if code is None else f"{code} {CODES[code]}"
            yield f"failed       {count:4d}  {meaning}"
        if self.left_out:
            yield f"left out     {self.left_out} of {len(self.conversations)} conversations without a verdict"


def judge_goals(conversations: Sequence[Sequence[Message]], judges: Sequence[Judge]) -> GoalReport:
    """The goals of each conversation by the majority of the judges that have a verdict on it.

    `judges`: an odd number, or ties are likely. A judge that fails raises its own error.
    """
    answers = [judge(conversations) for judge in judges]
    found: list[tuple[Goal, ...] | None] = []
    for votes in zip(*answers, strict=True):
        known = [vote for vote in votes if vote is not None]
        verdicts = majority(known) if known else None
        found.append(None if verdicts is None else tuple(goals_of(verdicts)))
    return GoalReport(tuple(found))
