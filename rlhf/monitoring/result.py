"""`Result`, what `Trainer.run()` returns: read from the files of the run, so that a resumed run has all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.monitoring.records import headlines, read_eval, read_metrics
from rlhf.monitoring.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluation on held-out data gave."""

    step: int
    """Steps that were done before it."""
    measure: str
    """`accuracy`, or `reward` where rewards are other than 0 and 1, or `pair accuracy` of held-out pairs."""
    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run."""

    run_dir: Path
    """The run folder, with metrics.jsonl, samples.jsonl, checkpoints/ and report.html."""
    steps: int
    """Steps that are done; fewer than the settings say where the run was interrupted."""
    metrics: Mapping[str, float]
    """The metrics of the last step (docs/metrics.md)."""
    before: Score | None
    """The evaluation before the first step; None: there was none."""
    after: Score | None
    """The evaluation after the last step; None: there was none."""
    model: Path | None
    """Folder of the exported model; None: the run was interrupted, or `checkpoint.export` is false."""


def result_of(folder: RunFolder, *, steps: int, model: Path | None) -> Result:
    """Reads the result after `steps` steps. Raises ValueError when RUN/eval.json is malformed."""
    logged, evaluations = read_metrics(folder), read_eval(folder)
    shown = headlines(evaluations)

    def score(step: int) -> Score | None:
        for record in evaluations:
            for figure in shown:
                if record["step"] == step and figure.is_in(record):
                    return Score(step, figure.word, *figure.of(record))
        return None

    none: dict[str, float] = {}
    last = next((entry for entry in logged if entry["step"] == steps), none)
    metrics = {name: value for name, value in last.items() if name != "step"}
    return Result(folder.path, steps, metrics, score(0), score(steps) if steps else None, model)
