"""reasoning-gym tasks (extra `gym`) as data and reward.

    data: {train: "gym:chain_sum?size=500&seed=1&max_terms=3"}

names one of its tasks and settings of that task; the reward `gym`, which is the reward when the config names
no other, has the task judge the answer. Entry `i` of a task depends on its seed, 0 when none is given, and
`i` alone. Beside the task's own settings: `chat=false` gives the question as plain text instead of one chat
message, and `instruction` is written behind every question.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, Literal, cast
from urllib.parse import parse_qsl

from rlhf.rewards.builtin import Completion, completion_text, last_number

PREFIX = "gym:"


def score(
    completions: Sequence[Completion],
    gym: Sequence[Mapping[str, Any]],
    extract: Literal["tag", "number", "whole"] = "tag",
) -> list[float]:
    """What the task says of the answer, 0 to 1; partly right answers may get a part.

    `extract`: what of the completion is the answer: the last `<answer>...</answer>` and, without one, all of
    it; the last number; or all of it.
    """
    return [
        float(_scorer(entry["task"])(_extract(completion_text(completion), extract), dict(entry["entry"])))
        for completion, entry in zip(completions, gym, strict=True)
    ]


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and columns (`prompt`, `answer`, `gym`) of each entry of `gym:TASK?setting=value&...`.

    Raises ValueError when the package is missing, there is no such task, or it has no such setting (the
    nearest neighbours are named), and the task's own error when it does not like a value.
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
        # without a seed the package draws one, and a resumed run would go on with other questions
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
        number = last_number(text)
        return "" if number is None else str(number)
    if how == "tag":
        tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
        return tagged[2].strip() if tagged[1] else text.strip()
    return text.strip()


@lru_cache
def _scorer(task: str) -> Any:
    return _library().get_score_answer_fn(task)


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
    """`3` is a number, `true` a truth value, `[1, 2]` a list; anything else is text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
