"""Writes RUN/report.html from the files of a run, and makes the text that a finished run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.files import write_atomically
from rlhf.monitoring.records import describe_eval, headlines, read_eval, read_groups, read_metrics
from rlhf.monitoring.report.verdict import verdict
from rlhf.monitoring.run_folder import RunFolder

SHOWN = 3
"""Completions in the text, of each of the two evaluations."""
LINE = 100
"""Characters of a line with a completion."""


def write_report(run: RunFolder) -> None:
    """Writes RUN/report.html from the files of the run folder; the page names what is missing there.

    Raises OSError when it cannot be written, and ValueError when RUN/eval.json is malformed.
    """
    # importing matplotlib is slow, and only a finished run needs it
    from rlhf.monitoring.report.page import render

    evaluations, steps = read_eval(run), read_metrics(run)
    page = render(
        str(run.path),
        verdict(evaluations, steps),
        evaluations=evaluations,
        steps=steps,
        groups=read_groups(run.samples),
        config=run.settings() or "",
    )
    write_atomically(run.report, page)


def closing_summary(run: RunFolder) -> str:
    """The text that a finished run prints: verdict, accuracy, a few completions, run folder and report."""
    evaluations = read_eval(run)
    said = verdict(evaluations, read_metrics(run))
    lines = [said.sentence, *(f"  {reason}" for reason in said.reasons), ""]
    shown = headlines(evaluations)
    judged = any(figure.word == "accuracy" for figure in shown)
    for record in evaluations[:1] + evaluations[1:][-1:]:
        lines.append(describe_eval(record, shown))
        lines += _sample_lines(record["samples"][:SHOWN], judged=judged)
        lines += _pair_lines(record.get("pairs"))
    lines += ["" if evaluations else "no evaluation was made", f"run folder  {run.path}"]
    if run.report.is_file():
        lines.append(f"report      {run.report}")
    if (run.path / "model" / "config.json").is_file():
        lines.append(f"model       {run.path / 'model'}, for from_pretrained of transformers and for vLLM")
    return "\n".join(lines)


def _sample_lines(samples: Sequence[Mapping[str, Any]], *, judged: bool) -> list[str]:
    """`judged`: whether completions are correct or wrong; otherwise their rewards are shown."""
    prompts = [_shorten(sample["prompt"], LINE // 2) for sample in samples]
    width = max(map(len, prompts), default=0)
    return [
        f"  {_outcome(sample, judged=judged):<7}  {prompt:<{width}}  ->  "
        + _shorten(sample["completion"], LINE - width - 17)
        for prompt, sample in zip(prompts, samples, strict=True)
    ]


def _pair_lines(pairs: Mapping[str, Any] | None) -> list[str]:
    """What the held-out pairs say beside their accuracy."""
    if pairs is None:
        return []
    now, before = pairs["accuracy_logprob"], pairs["accuracy_reference"]
    flipped = "" if pairs["flipped"] is None else f"; {pairs['flipped']:.3f} of its wrong ones now are"
    return [
        f"  chosen is {pairs['margin']:.2f} nats further ahead of rejected than under the reference",
        f"  by log-probability {now:.3f} are right, under the reference {before:.3f}{flipped}",
    ]


def _outcome(sample: Mapping[str, Any], *, judged: bool) -> str:
    if judged:
        return "correct" if sample["right"] else "wrong"
    return "none" if sample["reward"] is None else f"{sample['reward']:.3f}"


def _shorten(text: str, length: int) -> str:
    """`text` as one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
