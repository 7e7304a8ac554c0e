"""Adapter for reward functions written for verl (`compute_score`): calls them as verl does.

    def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": ...}

A function with the parameters `solution_str` and `ground_truth` is taken for one. `solution_str` is the text
of the completion; the columns `data_source` and `extra_info` are passed on; `ground_truth` is the column of
that name or, as in verl's datasets, `reward_model["ground_truth"]`. If the function returns a dict, its entry
`score` is the reward, as in verl.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rlhf.rewards.builtin import completion_text
from rlhf.rewards.workers.return_values import run_now

PASSED_ON = ("data_source", "extra_info")


def is_compute_score(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function with these parameters is a `compute_score` written for verl."""
    return {"solution_str", "ground_truth"} <= parameters.keys()


class VerlReward:
    """Gives a `compute_score` the signature of the other reward functions (rlhf/rewards/plugin.py)."""

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
        """`others`: columns (lists with one entry per sample) and params (the same for all samples)."""
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
