"""`rlhf eval --goals`: the judges that are named, and the conversations of an evaluation that they judge."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml

from rlhf.config.section import ConfigError
from rlhf.evaluation.goals import GoalReport, judge_goals
from rlhf.plugins import load_plugin
from rlhf.rewards.judges.goals import GoalJudge, Judge, Message, read_judge
from rlhf.rewards.remote import RemoteError
from rlhf.rewards.workers.pool import RewardError
from rlhf.rewards.workers.return_values import WrongReturn
from rlhf.types import Group


def goal_judges(spec: str) -> list[Judge]:
    """The judges that `--goals` names: `my.py:judge`, or the arguments of `GoalJudge` as YAML, and `votes`.

    The latter is how often the model is asked about each conversation. Raises ConfigError.
    """
    try:
        given: object = yaml.safe_load(spec)
    except yaml.YAMLError as error:
        raise ConfigError(f"--goals: {spec} is neither my.py:judge nor YAML: {error}") from None
    try:
        return _of_model(cast(Mapping[str, Any], given)) if isinstance(given, Mapping) else [_plugin(spec)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--goals: {error}") from None


def _of_model(given: Mapping[str, Any]) -> list[Judge]:
    arguments = dict(given)
    votes = arguments.pop("votes", 1)
    if not isinstance(votes, int) or votes < 1:
        raise ValueError(f"votes must be a whole number, at least 1, got {votes!r}")
    if votes > 1 and not arguments.get("temperature"):
        raise ValueError("votes of one model are the same at temperature 0: set a temperature above 0")
    inspect.signature(GoalJudge).bind(**arguments)
    each: list[dict[str, Any]] = [{"sample": k} for k in range(votes)] if votes > 1 else [{}]
    return [GoalJudge(**arguments, **own) for own in each]


def _plugin(spec: str) -> Judge:
    found = load_plugin(spec)
    found = found() if inspect.isclass(found) else found
    if not callable(found):
        raise ValueError(f"{spec} must be a function judge(conversations), or a class with __call__")
    return read_judge(found)


def conversations_of(groups: Sequence[Group]) -> list[list[Message]]:
    """The conversation of each sample, from the first message of its prompt on."""
    found: list[list[Message]] = []
    for group in groups:
        content = group.prompt.content
        prompt = [{"role": "user", "content": content}] if isinstance(content, str) else content
        for t in group.trajectories:
            found.append([*prompt, *(t.messages or ({"role": "assistant", "content": t.text},))])
    return found


def report_goals(groups: Sequence[Group], judges: Sequence[Judge]) -> GoalReport:
    """Judges all samples. Raises RewardError: a judge cannot be asked, or returns something else."""
    try:
        return judge_goals(conversations_of(groups), judges)
    except (RemoteError, WrongReturn) as error:
        raise RewardError(f"--goals: {error}") from None
