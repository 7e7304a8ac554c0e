"""RUN/metrics.jsonl, RUN/eval.json and RUN/samples.jsonl, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rlhf.files import write_atomically
from rlhf.monitoring.report.browser import GROUPS
from rlhf.monitoring.run_folder import RunFolder


def read_groups(stream: Path) -> list[dict[str, Any]]:
    """The groups to show of RUN/samples.jsonl, evenly over its steps, the first and the last among them."""
    lines = whole_lines(stream)
    if len(lines) > GROUPS:
        lines = [lines[round(i * (len(lines) - 1) / (GROUPS - 1))] for i in range(GROUPS)]
    return [json.loads(line) for line in lines]


def whole_lines(stream: Path) -> list[str]:
    """Without a last one that was torn."""
    if not stream.is_file():
        return []
    # not splitlines, which takes some characters inside of a text for line ends
    return stream.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


FIELDS = ("step", "accuracy", "num_samples", "ci_low", "ci_high", "samples")


def append_eval(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Adds an evaluation to RUN/eval.json, in place of an earlier one of the same step."""
    assert set(record) == set(FIELDS), f"an evaluation has {FIELDS}, got {tuple(record)}"
    records = [r for r in read_eval(run) if r["step"] != record["step"]]
    records = sorted([*records, dict(record)], key=lambda r: cast(int, r["step"]))
    write_atomically(run.evaluations, json.dumps(records, indent=1, ensure_ascii=False))


def read_eval(run: RunFolder) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first. Raises ValueError when RUN/eval.json does not hold any."""
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
    return (
        f"after step {record['step']}: held-out accuracy {record['accuracy']:.3f}, 95% interval "
        f"{record['ci_low']:.3f} to {record['ci_high']:.3f}, {record['num_samples']} samples"
    )


def read_metrics(run: RunFolder) -> list[dict[str, float]]:
    """The steps of a run, oldest first, with the finite values of each. A torn last line is left out."""
    entries = map(json.loads, whole_lines(run.metrics))
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def _is_record(record: object) -> bool:
    return isinstance(record, dict) and set(FIELDS) <= set(cast(dict[str, Any], record))
