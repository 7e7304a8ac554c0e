"""`steps`: how good each step of a completion is (a process reward model), by cross-entropy.

    {"prompt": ..., "steps": ["first, ...", "so ...", ...], "labels": [1, 1, 0]}

    mean over all steps of  -label log sigmoid(s) - (1 - label) log(1 - sigmoid(s))

s is read at the token that ends a step: the last one of `score.step_separator`, which is put between steps,
or the end-of-sequence token of the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algos.reward_model.losses import step_loss
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import Example, number_of
from rlhf.evaluation.calibration import rating_calibration
from rlhf.metrics import Mean, Metrics
from rlhf.models.scored_text import AtSteps
from rlhf.reward_model.kinds.base import Judged, compared
from rlhf.reward_model.learner import Batch, TrainedKind
from rlhf.reward_model.model import RewardModel, Scored
from rlhf.types import Prompt


class Steps(TrainedKind):
    columns = ("steps", "labels")

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        self.form = AtSteps(config.score.step_separator)

    @property
    def saved(self) -> Mapping[str, Any]:
        return self.form.entries

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        steps, separator = _steps(prompt.columns["steps"], where), self.form.separator
        for step in steps:
            if separator in step:
                raise ValueError(
                    f"{where}: the step {step!r:.80} has score.step_separator = {separator!r} in it, by "
                    "which completions are cut into steps: cut it there, or set another separator"
                )
        given: object = prompt.columns["labels"]
        if not isinstance(given, list) or len(cast(list[object], given)) != len(steps):
            raise ValueError(
                f"{where}: labels must be a list of {len(steps)} numbers, one for each step, got "
                f"{given!r:.80}"
            )
        labels = [_label(value, where) for value in cast(list[object], given)]
        ids, places = self.form.write_steps(tokenizer, steps)
        text = separator.join(steps)
        return Example(prompt, (text,), (tuple(ids),), tuple(labels), (tuple(places),))

    def loss(
        self, model: RewardModel, scored: Scored, micro: Sequence[Example], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        scores = scored.scores[:, 0]
        labels = _labels(micro, scores)
        loss, count = step_loss(scores, labels).sum(), float(len(labels))
        right = ((scores > 0) == (labels > 0.5)).float().sum().item()
        return loss / sum(len(e.labels) for e in batch.examples), {
            "reward_model/loss": Mean(loss.item(), count),
            "reward_model/accuracy": Mean(right, count),
        }

    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        """Accuracy over pairs of steps with different labels; beside it the share of steps told right."""
        labels = _labels(examples, scores)
        correct = compared(scores[:, 0], labels)
        if not correct:
            raise ValueError("data.eval: all held-out steps have the same label; add examples with others")
        told = ((scores[:, 0] > 0) == (labels > 0.5)).float().mean().item()
        bins = rating_calibration(scores[:, 0].sigmoid(), labels)
        return {self.config.score.objectives[0]: Judged(correct, bins, {"steps told right": told})}


def _steps(given: object, where: str) -> list[str]:
    steps = cast(list[object], given) if isinstance(given, list) else []
    if not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise ValueError(f"{where}: steps must be a list of texts, none of them empty, got {given!r:.80}")
    return cast(list[str], steps)


def _label(value: object, where: str) -> float:
    """TRL's data has true and false."""
    label = float(value) if isinstance(value, bool) else number_of(where, "each label", value)
    if not 0 <= label <= 1:
        raise ValueError(f"{where}: each label must be from 0 (a bad step) to 1 (a good one), got {label:g}")
    return label


def _labels(examples: Sequence[Example], like: Tensor) -> Tensor:
    """The labels of all steps, `[S]`."""
    labels = [label for example in examples for label in example.labels]
    return torch.tensor(labels, dtype=like.dtype, device=like.device)
