"""Adapter for reward functions written for verl (`compute_score`): calls them as verl does.

    def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": ...}
    def compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> list of these

A function with the parameters `solution_str` and `ground_truth`, or with their plurals, is taken for one.
`solution_str` is the text of the completion; the column `data_source` is passed on, and `extra_info` too, as
`{}` where the dataset has no such column; `ground_truth` is the column of that name or, as in verl's
datasets, `reward_model["ground_truth"]`. If the function returns a dict, its entry `score` is the reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from rlhf.rewards.builtin import completion_text
from rlhf.rewards.workers.return_values import WrongReturn, run_now

Kind = Literal["", "sample", "batch"]


def verl_kind(parameters: Mapping[str, inspect.Parameter]) -> Kind:
    """ "sample" for a `compute_score` of one completion, "batch" for one of several, "" for neither."""
    if {"solution_str", "ground_truth"} <= parameters.keys():
        return "sample"
    return "batch" if {"solution_strs", "ground_truths"} <= parameters.keys() else ""


class VerlReward:
    """Gives a `compute_score` the signature of the other reward functions (rlhf/rewards/plugin.py)."""

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Mapping[str, inspect.Parameter],
        params: Mapping[str, Any],
        kind: Kind,
    ) -> None:
        """`params`: arguments that are the same for all samples, whatever their type."""
        self.function, self.params, self.kind = function, params, kind
        self.plural = "s" if kind == "batch" else ""
        given = {
            f"{name}{self.plural}" for name in ("solution_str", "ground_truth", "data_source", "extra_info")
        }
        columns = {"data_source", "extra_info"}
        self.columns = {
            name for name in columns if f"{name}{self.plural}" in parameters.keys() - params.keys()
        }
        """Columns that are passed on under verl's own names."""
        self.others = set(parameters) - given - set(params)
        """Columns that are passed on under the names of the function's further parameters."""
        self.accepts = ("completions", "ground_truth", "reward_model", *sorted(self.columns | self.others))
        needed = [n for n in sorted(self.others) if parameters[n].default is inspect.Parameter.empty]
        source = parameters.get(f"data_source{self.plural}")
        if "data_source" in self.columns and source is not None and source.default is source.empty:
            needed.append("data_source")
        truth = f"ground_truth{self.plural}"
        self.requires = tuple((name,) for name in needed)
        if truth not in params:
            self.requires = (("ground_truth", "reward_model"), *self.requires)

    def __call__(
        self,
        completions: Sequence[Any],
        ground_truth: Sequence[Any] | None = None,
        reward_model: Sequence[Mapping[str, Any]] | None = None,
        **columns: Sequence[Any],
    ) -> list[Any]:
        """`columns`: lists with one entry per sample."""
        given: dict[str, Sequence[Any]] = {"solution_str": [completion_text(c) for c in completions]}
        if f"ground_truth{self.plural}" not in self.params:
            if ground_truth is None:
                assert reward_model is not None
                ground_truth = [column["ground_truth"] for column in reward_model]
            given["ground_truth"] = ground_truth
        if "extra_info" in self.columns:
            given["extra_info"] = [
                {} if c is None else c for c in columns.pop("extra_info", [None] * len(completions))
            ]
        if "data_source" in columns:
            given["data_source"] = columns.pop("data_source")
        if self.kind == "batch":
            return self._batch({f"{name}s": list(values) for name, values in given.items()} | columns)
        given |= columns
        return [
            _score(self._result({name: values[i] for name, values in given.items()}))
            for i in range(len(completions))
        ]

    def _batch(self, arguments: Mapping[str, Any]) -> list[Any]:
        result: Any = self._result(arguments)
        if isinstance(result, str | Mapping) or not hasattr(result, "__iter__"):
            raise WrongReturn(
                f"must return a list of scores, got {type(cast(Any, result)).__name__} {result!r:.80}"
            )
        return [_score(value) for value in result]

    def _result(self, arguments: Mapping[str, Any]) -> Any:
        result = self.function(**arguments, **self.params)
        return run_now(result) if inspect.iscoroutine(result) else result


def _score(result: Any) -> Any:
    return cast(Mapping[str, Any], result)["score"] if isinstance(result, Mapping) else result
