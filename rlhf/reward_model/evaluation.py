"""Evaluation of a reward model on held-out examples: pairwise accuracy, calibration, what the kind adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from rlhf.data.pairs import Example
from rlhf.evaluation.calibration import calibration_error
from rlhf.evaluation.intervals import share_interval
from rlhf.evaluation.pairs import SHOWN
from rlhf.reward_model.kinds.base import Kind
from rlhf.torch_typed import pieces


def evaluate(
    kind: Kind, scores: Tensor, examples: Sequence[Example], step: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record for RUN/eval.json and one for RUN/calibration.json, of the `scores` `[S, K]` of all examples.

    Accuracy is a share of pairs: those in which the better completion has the higher score. A tie counts
    half. What the better one is, and which pairs there are, says `Kind.judge`, which may raise ValueError.
    """
    found = kind.judge(scores, examples)
    correct = [x for judged in found.values() if judged.counts for x in judged.correct]
    low, high = share_interval(correct)
    accuracy = sum(correct) / len(correct)
    of_each = pieces(scores, [e.num_scored for e in examples])
    shown = [kind.shown(e, s) for e, s in zip(examples[:SHOWN], of_each, strict=False)]
    record = {
        "step": step,
        "accuracy": accuracy,
        "num_samples": len(correct),
        "ci_low": low,
        "ci_high": high,
        "samples": [sample for sample in shown if sample is not None],
    }
    objectives = {
        name: {
            "accuracy": sum(judged.correct) / len(judged.correct),
            "calibration_error": calibration_error(judged.bins),
            "bins": [asdict(b) for b in judged.bins],
            **judged.further,
        }
        for name, judged in found.items()
    }
    return record, {"step": step, "accuracy": accuracy, "objectives": objectives}
