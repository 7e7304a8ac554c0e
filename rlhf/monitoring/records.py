"""Reads RUN/metrics.jsonl, RUN/samples.jsonl and RUN/eval.json, and adds evaluations to RUN/eval.json.

RUN/eval.json is a list with one object for each evaluation, ordered by step:

    {"step": 20, "accuracy": 0.93, "num_samples": 128, "ci_low": 0.87, "ci_high": 0.96,
     "samples": [{"prompt": "What is 3 + 5?", "completion": "8", "reward": 1.0, "right": true}, ...]}

`accuracy` is the share of correct completions, `ci_low` and `ci_high` bound its 95% interval. `samples` has a
few completions, of the same prompts each time and not selected by their outcome; "right" is true for a
correct one. `pairs` has what held-out preference pairs say (`rlhf.evaluation.pairs.PairResult`); where
nothing was sampled beside them, the figures of samples are null. `rlhf/evaluation/accuracy.py` says what the
other keys are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rlhf.files import write_atomically
from rlhf.monitoring.report.browser import GROUPS
from rlhf.monitoring.run_folder import RunFolder

logger = logging.getLogger(__name__)


def read_groups(stream: Path) -> list[dict[str, Any]]:
    """Groups of RUN/samples.jsonl for a report: at most `GROUPS`, evenly spaced, first and last included."""
    lines = whole_lines(stream)
    if len(lines) > GROUPS:
        lines = [lines[round(i * (len(lines) - 1) / (GROUPS - 1))] for i in range(GROUPS)]
    return _objects(stream, lines)


def _objects(stream: Path, lines: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of the lines; a warning says of which file lines are damaged and left out."""
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry: object = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            found.append(cast(dict[str, Any], entry))
    if len(found) < len(lines):
        logger.warning("%s: %d damaged lines are left out", stream, len(lines) - len(found))
    return found


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
# the metrics of held-out pairs, by their keys in `pairs`
PAIR_METRICS = {
    "accuracy": "eval/pair_accuracy",
    "accuracy_per_token": "eval/pair_accuracy_per_token",
    "accuracy_reference": "eval/pair_accuracy_reference",
    "flipped": "eval/pair_flipped",
    "idealised": "eval/pair_idealised",
    "topk_mass": "eval/topk_mass",
    "topk_entropy": "eval/topk_entropy",
    "topk_entropy_normalised": "eval/topk_entropy_normalised",
}


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


def eval_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation by the names of docs/metrics.md; those it does not have are left out."""
    pairs: Mapping[str, Any] = record.get("pairs") or {}
    figures = {"eval/accuracy": record["accuracy"], "eval/reward": record.get("reward")}
    figures |= {name: pairs.get(key) for key, name in PAIR_METRICS.items()}
    return {name: value for name, value in figures.items() if value is not None}


def describe_eval(record: Mapping[str, Any], shown: Sequence[Headline] = ()) -> str:
    """An evaluation in one line, for the user. `shown`: the figures that all evaluations of the run show."""
    parts = [
        f"held-out {figure.word} {value:.3f}, 95% interval {low:.3f} to {high:.3f}, {figure.count(record)}"
        for figure in shown or headlines([record])
        if figure.is_in(record)
        for value, low, high in [figure.of(record)]
    ]
    if record.get("truncated"):
        # behind the figure of samples, which comes first
        parts.insert(1, f"{100 * record['truncated']:.0f}% cut at the token limit")
    return f"after step {record['step']}: {'; '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure of evaluations that is shown, by its name in words."""

    word: Literal["accuracy", "reward", "pair accuracy"]

    @property
    def of_pairs(self) -> bool:
        """Whether it is of preference pairs, and so says nothing of samples."""
        return self.word == "pair accuracy"

    def is_in(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has the figure."""
        return bool(record.get("pairs")) if self.of_pairs else record["num_samples"] > 0

    def of(self, record: Mapping[str, Any]) -> tuple[float, float, float]:
        """The figure of a record that has it, and the bounds of its 95% interval."""
        keys = {
            "accuracy": ("accuracy", "ci_low", "ci_high"),
            "reward": ("reward", "reward_low", "reward_high"),
            "pair accuracy": ("accuracy", "ci_low", "ci_high"),
        }
        source = record["pairs"] if self.of_pairs else record
        value, low, high = (source[key] for key in keys[self.word])
        return value, low, high

    def count(self, record: Mapping[str, Any]) -> str:
        """Of how many samples or pairs it is, as `128 samples`."""
        if self.of_pairs:
            return f"{record['pairs']['num_pairs']} pairs"
        return f"{record['num_samples']} samples"


def headlines(records: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """The figures that all of them show: one of samples, where any were made, then that of pairs.

    Of samples it is the accuracy where "correct" means something: not as soon as one of the evaluations had
    rewards other than 0 and 1, which are then shown.
    """
    sampled = [record for record in records if record["num_samples"] > 0]
    measures = {record.get("measure", "accuracy") for record in sampled}
    has_reward = all(record.get("reward") is not None for record in sampled)
    of_samples = Headline("reward" if "reward" in measures and has_reward else "accuracy")
    pairs = Headline("pair accuracy")
    return [of_samples] * bool(sampled) + [pairs] * any(map(pairs.is_in, records))


def read_metrics(run: RunFolder) -> list[dict[str, float]]:
    """The finite metrics of each step, oldest step first. An incomplete last line is left out."""
    entries = _objects(run.metrics, whole_lines(run.metrics))
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def _is_record(record: object) -> bool:
    return isinstance(record, dict) and set(FIELDS) <= set(cast(dict[str, Any], record))
