"""The objects that a reward function gets beside its samples: `log_metric`, `log_extra`, `trainer_state`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from rlhf.rewards.signature import FROM_WORKER

LONGEST = 1000
"""Characters of a value that `log_extra` keeps."""


class CallLog:
    """Collects what one call logs; its methods have the names and arguments of TRL's."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[str]] = {}

    def log_metric(self, name: str, value: Any) -> None:
        """Logs a number as the metric `reward/<function>/<name>`; the mean over a step's calls is shown.

        A number that is not finite is not logged, which is printed.
        """
        number = float(value)
        if math.isfinite(number):
            self.metrics.setdefault(str(name), []).append(number)
        else:
            sys.stdout.write(f"log_metric({name!r}, {value!r}) is left out: the value is not finite\n")

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Logs a value for each completion, in RUN/rewards.log and RUN/samples.jsonl.

        Raises ValueError for another number of values.
        """
        listed = list(values)
        if len(listed) != self.samples:
            raise ValueError(
                f"log_extra({column!r}, ...) needs {self.samples} values, one a completion, got {len(listed)}"
            )
        self.extra[str(column)] = [_in_a_line(value) for value in listed]

    def answer(self) -> dict[str, Any]:
        """The part of a worker's answer that has what was logged; empty where nothing was."""
        logged = {"metrics": self.metrics, "extra": self.extra}
        return {"logged": logged} if self.metrics or self.extra else {}


class TrainerState(SimpleNamespace):
    """`trainer_state` as TRL passes it: `global_step`, and in a run also `max_steps` and `epoch`."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no {name!r}, only {', '.join(sorted(vars(self)))}")


def with_objects(arguments: Mapping[str, Any], log: CallLog) -> dict[str, Any]:
    """The arguments of a call with `trainer_state` as an object, and with the functions that log."""
    added = {name: getattr(log, name) for name in FROM_WORKER}
    if "trainer_state" in arguments:
        added["trainer_state"] = TrainerState(**arguments["trainer_state"])
    return {**arguments, **added}


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own. Raises TypeError for anything else."""
    if not hasattr(value, "tolist"):
        raise TypeError
    return value.tolist()


def _in_a_line(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError):
        text = repr(value).replace("\n", "\\n")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
