"""The reward function of verl, `compute_score`, called as verl calls it.

    def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": ...}

It is known by its parameters `solution_str` and `ground_truth`. `solution_str` is the completion's text; the
columns `data_source` and `extra_info` are passed on; `ground_truth` is the column of that name or, as verl's
datasets have it, `reward_model["ground_truth"]`. Of a dict the entry `score` counts, as there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rlhf.rewards.builtin import completion_text
from rlhf.rewards.workers.values import run_now

PASSED_ON = ("data_source", "extra_info")


def is_compute_score(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return {"solution_str", "ground_truth"} <= parameters.keys()


class VerlReward:
    """A `compute_score` under the signature of the other reward functions."""

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> None:
        self.function = function
        self.columns = {name for name in PASSED_ON if name in parameters}
        self.accepts = tuple(
            {"completions", "ground_truth", "reward_model", *parameters}.difference({"solution_str"})
        )
        needed = [n for n in sorted(self.columns) if parameters[n].default is inspect.Parameter.empty]
        self.requires = (("ground_truth", "reward_model"), *((name,) for name in needed))

    def __call__(
        self,
        completions: Sequence[Any],
        ground_truth: Sequence[Any] | None = None,
        reward_model: Sequence[Mapping[str, Any]] | None = None,
        **others: Any,
    ) -> list[Any]:
        """`others` are columns, which are lists, and params, which are the same for every sample."""
        if ground_truth is None:
            assert reward_model is not None
            ground_truth = [column["ground_truth"] for column in reward_model]
        columns: dict[str, list[Any]] = {k: v for k, v in others.items() if isinstance(v, list)}
        params = {name: value for name, value in others.items() if name not in columns}
        return [
            self._score(
                solution_str=completion_text(completion),
                ground_truth=truth,
                **{name: column[i] for name, column in columns.items()},
                **params,
            )
            for i, (completion, truth) in enumerate(zip(completions, ground_truth, strict=True))
        ]

    def _score(self, **arguments: Any) -> Any:
        result = self.function(**arguments)
        if inspect.iscoroutine(result):
            result = run_now(result)
        return cast(Mapping[str, Any], result)["score"] if isinstance(result, Mapping) else result
