"""`ratings`: how good each completion is, by half the squared error, with a head for each objective.

{"prompt": ..., "completion": "text", "ratings": {"helpful": 4, "polite": null}}

mean over the given ratings of 0.5 (s - rating)^2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algos.reward_model.losses import rating_loss
from rlhf.data.completions import completion_ids
from rlhf.data.pairs import Example
from rlhf.data.preferences import completion_text
from rlhf.evaluation.calibration import rating_calibration
from rlhf.metrics import Mean, Metrics
from rlhf.reward_model.kinds.base import Judged, compared, labels_of
from rlhf.reward_model.learner import Batch, TrainedKind
from rlhf.reward_model.model import RewardModel, Scored
from rlhf.types import Prompt


class Ratings(TrainedKind):
    columns = ("completion", "ratings")

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        text = completion_text(where, "completion", prompt.columns["completion"])
        ratings = _ratings(prompt.columns["ratings"], self.config.score.objectives, where)
        return Example(prompt, (text,), (completion_ids(tokenizer, text),), ratings)

    def loss(
        self, model: RewardModel, scored: Scored, micro: Sequence[Example], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        ratings = labels_of(micro, scored.scores)
        loss = rating_loss(scored.scores, ratings).sum()
        rated = float((~ratings.isnan()).sum())
        # a rating that is not given is NaN, which does not equal itself
        given = sum(value == value for example in batch.examples for value in example.labels)
        return loss / given, {"reward_model/loss": Mean(loss.item(), rated)}

    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        ratings = labels_of(examples, scores)
        found: dict[str, Judged] = {}
        for k, name in enumerate(self.config.score.objectives):
            if correct := compared(scores[:, k], ratings[:, k]):
                found[name] = Judged(correct, rating_calibration(scores[:, k], ratings[:, k]))
        if not found:
            raise ValueError(
                "data.eval: all held-out ratings of an objective are the same, so accuracy cannot be "
                "measured; add examples with other ratings"
            )
        return found


def _ratings(value: object, objectives: Sequence[str], where: str) -> tuple[float, ...]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: ratings must be an object of numbers by objective, got {value!r:.80}")
    given = cast(Mapping[str, object], value)
    unknown = sorted(set(given) - set(objectives))
    if unknown:
        raise ValueError(
            f"{where}: ratings has {', '.join(unknown)}, which is not in score.objectives "
            f"({', '.join(objectives)})"
        )
    ratings: list[float] = []
    for name in objectives:
        rating = given.get(name)
        if rating is not None and not (isinstance(rating, int | float) and math.isfinite(rating)):
            raise ValueError(f"{where}: the rating of {name} must be a number or null, got {rating!r:.80}")
        ratings.append(math.nan if rating is None else float(rating))
    if all(map(math.isnan, ratings)):
        raise ValueError(f"{where}: none of the objectives is rated")
    return tuple(ratings)
