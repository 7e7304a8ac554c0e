"""What a run came to: its evaluations, its closing summary, its report page.

RUN/eval.json is a list, one object an evaluation, ordered by step:

    {"step": 20, "accuracy": 0.93, "num_samples": 128, "ci_low": 0.87, "ci_high": 0.96,
     "samples": [{"prompt": "What is 3 + 5?", "completion": "8", "reward": 1.0, "right": true}, ...]}

`accuracy` is the share of right completions, `ci_low` and `ci_high` bound its 95% interval; `samples` has a
few completions, of the same prompts each time, and not chosen by how they turned out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.files import write_atomically
from rlhf.monitoring.records import describe_eval, read_eval, read_groups, read_metrics
from rlhf.monitoring.report.verdict import verdict
from rlhf.monitoring.run_folder import RunFolder

SHOWN = 3
LINE = 100


def write_report(run: RunFolder) -> None:
    """Writes RUN/report.html from what the run folder holds; what is missing there is left out, and named.

    Raises OSError when it cannot be written.
    """
    # matplotlib takes its time to import, and only a run that has ended needs it
    from rlhf.monitoring.report.page import render

    evaluations, steps = read_eval(run), read_metrics(run)
    page = render(
        str(run.path),
        verdict(evaluations, steps),
        evaluations=evaluations,
        steps=steps,
        groups=read_groups(run.samples),
        config=run.config.read_text(encoding="utf-8") if run.config.is_file() else "",
    )
    write_atomically(run.report, page)


def closing_summary(run: RunFolder) -> str:
    """What one wants to read when a run has ended: verdict, accuracy, a few completions, where things are."""
    evaluations = read_eval(run)
    said = verdict(evaluations, read_metrics(run))
    lines = [said.sentence, *(f"  {reason}" for reason in said.reasons), ""]
    for record in evaluations[:1] + evaluations[1:][-1:]:
        lines.append(describe_eval(record))
        lines += _sample_lines(record["samples"][:SHOWN])
    lines += ["" if evaluations else "no evaluation was made", f"run folder  {run.path}"]
    if run.report.is_file():
        lines.append(f"report      {run.report}")
    return "\n".join(lines)


def _sample_lines(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    prompts = [_shorten(sample["prompt"], LINE // 2) for sample in samples]
    width = max(map(len, prompts), default=0)
    return [
        f"  {'right' if sample['right'] else 'wrong'}  {prompt:<{width}}  ->  "
        + _shorten(sample["completion"], LINE - width - 15)
        for prompt, sample in zip(prompts, samples, strict=True)
    ]


def _shorten(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
