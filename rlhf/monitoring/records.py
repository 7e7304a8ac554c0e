"""Reads RUN/metrics.jsonl, RUN/samples.jsonl and RUN/eval.json, and adds evaluations to RUN/eval.json.

RUN/eval.json is a list with one object for each evaluation, ordered by step:

    {"step": 20, "accuracy": 0.93, "num_samples": 128, "ci_low": 0.87, "ci_high": 0.96,
     "samples": [{"prompt": "What is 3 + 5?", "completion": "8", "reward": 1.0, "right": true}, ...]}

`accuracy` is the share of correct completions, `ci_low` and `ci_high` bound its 95% interval. `samples` has a
few completions, of the same prompts each time and not selected by their outcome; "right" is true for a
correct one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

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


def append_eval(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Adds an evaluation to RUN/eval.json, or replaces the one of the same step.

    Raises OSError when the file cannot be written.
    """
    assert set(record) == set(FIELDS), f"an evaluation has {FIELDS}, got {tuple(record)}"
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


def describe_eval(record: Mapping[str, Any]) -> str:
    """An evaluation in one line, for the user."""
    return (
        f"after step {record['step']}: held-out accuracy {record['accuracy']:.3f}, 95% interval "
        f"{record['ci_low']:.3f} to {record['ci_high']:.3f}, {record['num_samples']} samples"
    )


def read_metrics(run: RunFolder) -> list[dict[str, float]]:
    """The finite metrics of each step, oldest step first. An incomplete last line is left out."""
    entries = map(json.loads, whole_lines(run.metrics))
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def _is_record(record: object) -> bool:
    return isinstance(record, dict) and set(FIELDS) <= set(cast(dict[str, Any], record))
