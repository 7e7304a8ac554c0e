"""Reads RUN/metrics.jsonl, RUN/samples.jsonl and RUN/eval.json, and adds evaluations to RUN/eval.json.

RUN/eval.json is a list with one object for each evaluation, ordered by step:

    {"step": 20, "accuracy": 0.93, "num_samples": 128, "ci_low": 0.87, "ci_high": 0.96,
     "samples": [{"prompt": "What is 3 + 5?", "completion": "8", "reward": 1.0, "right": true}, ...]}

`accuracy` is the share of correct completions, `ci_low` and `ci_high` bound its 95% interval. `samples` has a
few completions, of the same prompts each time and not selected by their outcome; "right" is true for a
correct one. `rlhf/evaluation/accuracy.py` says what the other keys are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rlhf.files import write_atomically
from rlhf.monitoring.report.browser import GROUPS
from rlhf.monitoring.run_folder import RunFolder


def read_groups(stream: Path) -> list[dict[str, Any]]:
    """Groups of RUN/samples.jsonl for a report: at most `GROUPS`, evenly spaced, first and last included."""
    lines = whole_lines(stream)
    if len(lines) > GROUPS:
        lines = [lines[round(i * (len(lines) - 1) / (GROUPS - 1))] for i in range(GROUPS)]
    return [json.loads(line) for line in lines]


def whole_lines(stream: Path) -> list[str]:
    """The lines of a file, without a last line that is incomplete; none where there is no file."""
    if not stream.is_file():
        return []
    # not splitlines, which would also split at characters such as U+2028 within a text
    return stream.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


# the keys of an evaluation in RUN/eval.json
FIELDS = ("step", "accuracy", "num_samples", "ci_low", "ci_high", "samples")
# those that evaluations of a policy have beside them; earlier versions did not write them
MORE_FIELDS = (
    "num_prompts",
    "measure",
    "reward",
    "reward_low",
    "reward_high",
    "truncated",
    "no_signal",
    "pairs",
)


def append_eval(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Adds an evaluation to RUN/eval.json, or replaces the one of the same step.

    Raises OSError when the file cannot be written.
    """
    assert set(FIELDS) <= set(record) <= {*FIELDS, *MORE_FIELDS}, (
        f"an evaluation has {FIELDS}, got {tuple(record)}"
    )
    records = [r for r in read_eval(run) if r["step"] != record["step"]]
    records = sorted([*records, dict(record)], key=lambda r: cast(int, r["step"]))
    write_atomically(run.evaluations, json.dumps(records, indent=1, ensure_ascii=False))


def read_eval(run: RunFolder) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first. Raises ValueError when RUN/eval.json is malformed."""
    if not run.evaluations.is_file():
        return []
    try:
        records = json.loads(run.evaluations.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run.evaluations} is not JSON: {error}") from None
    if not isinstance(records, list) or not all(_is_record(r) for r in cast(list[Any], records)):
        raise ValueError(f"{run.evaluations} must be a list of objects with {', '.join(FIELDS)}")
    return cast(list[dict[str, Any]], records)


def describe_eval(record: Mapping[str, Any], shown: Headline | None = None) -> str:
    """An evaluation in one line, for the user. `shown`: the figure that all evaluations of the run show."""
    shown = shown or headline([record])
    value, low, high = shown.of(record)
    line = (
        f"after step {record['step']}: held-out {shown.word} {value:.3f}, "
        f"95% interval {low:.3f} to {high:.3f}, {record['num_samples']} samples"
    )
    if record.get("truncated"):
        line += f"; {100 * record['truncated']:.0f}% cut at the token limit"
    return line


@dataclass(frozen=True, slots=True)
class Headline:
    """Which figure of an evaluation is shown: accuracy where "correct" means something, else the reward."""

    word: Literal["accuracy", "reward"]

    def of(self, record: Mapping[str, Any]) -> tuple[float, float, float]:
        """The figure of a record, and the bounds of its 95% interval."""
        keys = {
            "accuracy": ("accuracy", "ci_low", "ci_high"),
            "reward": ("reward", "reward_low", "reward_high"),
        }
        value, low, high = (record[key] for key in keys[self.word])
        return value, low, high


def headline(records: Sequence[Mapping[str, Any]]) -> Headline:
    """One figure for all of them: the reward as soon as one of them had rewards other than 0 and 1."""
    measures = {record.get("measure", "accuracy") for record in records}
    has_reward = all(record.get("reward") is not None for record in records)
    return Headline("reward" if "reward" in measures and has_reward else "accuracy")


def read_metrics(run: RunFolder) -> list[dict[str, float]]:
    """The finite metrics of each step, oldest step first. An incomplete last line is left out."""
    entries = map(json.loads, whole_lines(run.metrics))
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def _is_record(record: object) -> bool:
    return isinstance(record, dict) and set(FIELDS) <= set(cast(dict[str, Any], record))
