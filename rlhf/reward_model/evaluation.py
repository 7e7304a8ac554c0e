"""Evaluation of a reward model on held-out examples: pairwise accuracy and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import Example
from rlhf.evaluation.calibration import Bin, calibration_error, pair_calibration, rating_calibration
from rlhf.evaluation.intervals import share_interval
from rlhf.evaluation.pairs import SHOWN
from rlhf.reward_model.learner import RewardModelLearner, ratings_of
from rlhf.torch_typed import integers

PAIRS_OF_RATINGS = 2000
"""How many pairs of completions with different ratings are compared, at most, for each objective."""


def evaluate(
    learner: RewardModelLearner, examples: Sequence[Example], config: RewardModelConfig, step: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record for RUN/eval.json and one for RUN/calibration.json. Every rank computes all of it.

    Accuracy is a share of pairs: those in which the chosen completion has the higher score, or, with ratings,
    those in which the higher rated completion has the higher score, over all objectives. A tie counts half.

    Raises ValueError when no two held-out ratings of an objective differ.
    """
    scores = learner.scores(examples)
    pairs = config.score.kind == "pairs"
    found = _of_pairs(scores) if pairs else _of_ratings(scores, examples, config)
    correct = [x for correct_of_one, _ in found.values() for x in correct_of_one]
    low, high = share_interval(correct)
    accuracy = sum(correct) / len(correct)
    record = {
        "step": step,
        "accuracy": accuracy,
        "num_samples": len(correct),
        "ci_low": low,
        "ci_high": high,
        "samples": [_sample(e, scores, i) for i, e in enumerate(examples[:SHOWN])] if pairs else [],
    }
    objectives = {
        name: {
            "accuracy": sum(correct_of_one) / len(correct_of_one),
            "calibration_error": calibration_error(bins),
            "bins": [asdict(b) for b in bins],
        }
        for name, (correct_of_one, bins) in found.items()
    }
    return record, {"step": step, "accuracy": accuracy, "objectives": objectives}


Found = dict[str, tuple[list[float], list[Bin]]]
"""For each objective: 1, 0.5 or 0 for each pair (correct, tie, wrong), and the bins of its calibration."""


def _of_pairs(scores: Tensor) -> Found:
    # rows alternate: chosen, rejected
    margins = scores[0::2, 0] - scores[1::2, 0]
    correct = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins.unbind()]
    return {"score": (correct, pair_calibration(margins))}


def _of_ratings(scores: Tensor, examples: Sequence[Example], config: RewardModelConfig) -> Found:
    ratings = ratings_of(examples, scores)
    found: Found = {}
    for k, name in enumerate(config.score.objectives):
        known = (~ratings[:, k].isnan()).nonzero()[:, 0]
        s, r = scores[known, k], ratings[known, k]
        # pairs among 200 completions of a fixed shuffle: all pairs would be too many
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
        correct: list[float] = []
        for i, j in combinations(integers(order)[:200], 2):
            if r[i] != r[j] and len(correct) < PAIRS_OF_RATINGS:
                agree = (s[i] - s[j]) * (r[i] - r[j])
                correct.append(1.0 if agree > 0 else 0.5 if agree == 0 else 0.0)
        if correct:
            found[name] = (correct, rating_calibration(scores[:, k], ratings[:, k]))
    if not found:
        raise ValueError(
            "data.eval: all held-out ratings of an objective are the same, so accuracy cannot be measured; "
            "add examples with other ratings"
        )
    return found


def _sample(example: Example, scores: Tensor, index: int) -> dict[str, Any]:
    margin = float(scores[2 * index, 0] - scores[2 * index + 1, 0])
    content = example.prompt.content
    return {
        "prompt": content if isinstance(content, str) else str(content[-1]["content"]),
        "completion": f"{example.texts[0]!r} rather than {example.texts[1]!r}",
        "reward": margin,
        "right": margin > 0,
    }
