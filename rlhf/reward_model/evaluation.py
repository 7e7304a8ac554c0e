"""How often a reward model is right on what it has not seen, and whether its confidence can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import Example
from rlhf.evaluation.accuracy import SHOWN
from rlhf.evaluation.calibration import Bin, calibration_error, pair_calibration, rating_calibration
from rlhf.evaluation.intervals import normal_interval
from rlhf.reward_model.learner import RewardModelLearner, ratings_of
from rlhf.torch_typed import integers

PAIRS_OF_RATINGS = 2000
"""At most so many pairs of differently rated completions are compared an objective."""


def evaluate(
    learner: RewardModelLearner, examples: Sequence[Example], config: RewardModelConfig, step: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A record for RUN/eval.json, and one for RUN/calibration.json. Every rank computes all of it.

    Accuracy: pairs in which the chosen completion has the higher score; of ratings, pairs of completions
    in which the higher rated one has, over all objectives.
    """
    scores = learner.scores(examples)
    pairs = config.score.kind == "pairs"
    found = _of_pairs(scores) if pairs else _of_ratings(scores, examples, config)
    right = [x for right_of_one, _ in found.values() for x in right_of_one]
    low, high = normal_interval(right)
    accuracy = sum(right) / len(right)
    record = {
        "step": step,
        "accuracy": accuracy,
        "num_samples": len(right),
        "ci_low": low,
        "ci_high": high,
        "samples": [_sample(e, scores, i) for i, e in enumerate(examples[:SHOWN])] if pairs else [],
    }
    objectives = {
        name: {
            "accuracy": sum(right_of_one) / len(right_of_one),
            "calibration_error": calibration_error(bins),
            "bins": [asdict(b) for b in bins],
        }
        for name, (right_of_one, bins) in found.items()
    }
    return record, {"step": step, "accuracy": accuracy, "objectives": objectives}


Found = dict[str, tuple[list[float], list[Bin]]]


def _of_pairs(scores: Tensor) -> Found:
    margins = scores[0::2, 0] - scores[1::2, 0]
    right = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins.unbind()]
    return {"score": (right, pair_calibration(margins))}


def _of_ratings(scores: Tensor, examples: Sequence[Example], config: RewardModelConfig) -> Found:
    ratings = ratings_of(examples, scores)
    found: Found = {}
    for k, name in enumerate(config.score.objectives):
        known = (~ratings[:, k].isnan()).nonzero()[:, 0]
        s, r = scores[known, k], ratings[known, k]
        # neighbours in a fixed shuffle rather than all pairs, of which there are very many
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
        right: list[float] = []
        for i, j in combinations(integers(order)[:200], 2):
            if r[i] != r[j] and len(right) < PAIRS_OF_RATINGS:
                agree = (s[i] - s[j]) * (r[i] - r[j])
                right.append(1.0 if agree > 0 else 0.5 if agree == 0 else 0.0)
        if right:
            found[name] = (right, rating_calibration(scores[:, k], ratings[:, k]))
    if not found:
        raise ValueError("the held-out ratings are all the same: there is nothing to tell apart")
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
