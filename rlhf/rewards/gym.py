"""Tasks of the package reasoning-gym (extra `gym`), as a dataset of prompts and as the reward `gym`.

    data: {train: "gym:chain_sum?size=500&seed=1&max_terms=3"}

Behind `gym:` stand the name of a task and settings of that task. The task also scores the answers, through
the reward `gym`, which is used when the config names no reward function. Entry `i` of a task depends only on
`i` and on the setting `seed` (0 unless given). Two more settings are ours: `chat=false` gives the question as
plain text instead of one chat message, and `instruction` is appended to every question, on a line of its own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any, Literal, cast
from urllib.parse import parse_qsl

from rlhf.rewards.builtin import Completion, completion_text
from rlhf.rewards.expressions import NotAnExpression, guard_library
from rlhf.rewards.numbers import final_answer
from rlhf.sandbox.confined import call_confined

PREFIX = "gym:"


def score(
    completions: Sequence[Completion],
    gym: Sequence[Mapping[str, Any]],
    extract: Literal["tag", "number", "whole"] = "tag",
) -> list[float]:
    """The task's own score of each answer, from 0 to 1; partly correct answers may score in between.

    `extract` says which part of the completion is the answer. `tag`: the text inside the last
    `<answer>...</answer>`, or the whole completion if it has none; `number`: the number that
    `numeric_match` reads; `whole`: the whole completion.

    Some tasks evaluate answers as Python: each is judged in a process of its own (rlhf/sandbox/confined.py),
    and an answer that is neither a value nor a formula (expressions.py) scores 0.
    """
    scores: list[float] = []
    for completion, entry in zip(completions, gym, strict=True):
        answer, task = _extract(completion_text(completion), extract), _scorer(entry["task"])
        scores.append(call_confined(partial(_judge, task, answer, dict(entry["entry"]))))
    return scores


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and columns (`prompt`, `answer`, `gym`) of each entry of `gym:TASK?setting=value&...`.

    Raises ValueError when the package is missing, when there is no such task or setting (the message names
    the most similar one), and when the task asserts that a value is invalid. Other exceptions of the task are
    passed on.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    settings = {key: _plain(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    chat, instruction = settings.pop("chat", True), str(settings.pop("instruction", ""))
    config = _registered(task)[1]
    known = [field.name for field in fields(config)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{source}: the task {task} has no setting {key!r}{_near(key, known)}")
    try:
        # without a seed the package draws a random one, and a resumed run would see other questions
        dataset: Any = _library().create_dataset(task, **{"seed": 0, **settings})
    except AssertionError as error:
        raise ValueError(f"{source}: {error or 'the task refuses these settings'}") from None
    for i in range(len(dataset)):
        entry = dataset[i]
        question = f"{entry['question']}\n{instruction}" if instruction else str(entry["question"])
        prompt = [{"role": "user", "content": question}] if chat else question
        columns = {"prompt": prompt, "answer": entry["answer"], "gym": {"task": task, "entry": entry}}
        yield f"{task}:{i}", columns


def _extract(text: str, how: str) -> str:
    if how == "number":
        number = final_answer(text)
        return "" if number is None else number.written
    if how == "tag":
        tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
        return tagged[2].strip() if tagged[1] else text.strip()
    return text.strip()


@lru_cache
def _scorer(task: str) -> Any:
    scorer = _library().get_score_answer_fn(task)
    guard_library("reasoning_gym")
    return scorer


def _judge(task: Any, answer: str, entry: dict[str, Any]) -> float:
    """The task's score; 0 for an answer that the task would have to run as code."""
    try:
        return float(task(answer, entry))
    except NotAnExpression:
        return 0.0


def _registered(task: str) -> tuple[Any, Any]:
    from reasoning_gym import factory  # pyright: ignore[reportMissingTypeStubs]

    tasks = cast(dict[str, tuple[Any, Any]], cast(Any, factory).DATASETS)
    _library()
    if task not in tasks:
        raise ValueError(
            f"reasoning-gym has no task {task!r}{_near(task, tasks)}; there are {len(tasks)}, see its gallery"
        )
    return tasks[task]


def _library() -> Any:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingTypeStubs]
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ValueError("gym: tasks need the package reasoning-gym: pip install 'tandem-rl[gym]'") from None
    return reasoning_gym


def _plain(value: str) -> Any:
    """A value of the query: JSON such as `3`, `true` or `[1, 2]` is decoded, anything else is text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
