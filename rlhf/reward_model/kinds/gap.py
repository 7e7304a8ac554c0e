"""`gap`: by how much one completion is better than another, read together (PIT).

    {"prompt": ..., "chosen": ..., "rejected": ...}

The model reads prompt, completion a and completion b, each with an end-of-sequence token, and gives g(a, b).
It learns from the four orders of a pair by five Bradley-Terry terms (`quality_gap`). As a reward, g compares
a completion with the dataset's column `reference`.

Source: PIT (arXiv:2310.00898). Difference: how the three texts are written, which the paper does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algos.reward_model.losses import quality_gap
from rlhf.data.pairs import Example
from rlhf.evaluation.calibration import pair_calibration
from rlhf.metrics import Mean, Metrics
from rlhf.models.scored_text import OfTwo
from rlhf.reward_model.kinds.base import Judged, agreement, is_right, shown_pair
from rlhf.reward_model.kinds.pairs import SIDES, two_texts
from rlhf.reward_model.learner import Batch, TrainedKind
from rlhf.reward_model.model import RewardModel, Scored
from rlhf.torch_typed import unflatten
from rlhf.types import Prompt


class Gap(TrainedKind):
    columns = SIDES
    form = OfTwo()

    @property
    def saved(self) -> Mapping[str, Any]:
        return self.form.entries

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        """Its four completions are (chosen, rejected), (chosen, chosen), (rejected, rejected) and (rejected,
        chosen), each written as one."""
        w, l = two_texts(prompt, where)  # noqa: E741
        orders = ((w, l), (w, w), (l, l), (l, w))
        written = tuple(tuple(self.form.write(tokenizer, a, b)[0]) for a, b in orders)
        return Example(prompt, (w, l), written)

    def loss(
        self, model: RewardModel, scored: Scored, micro: Sequence[Example], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        better, of_chosen, of_rejected, worse = _gaps(scored.scores)
        loss, count = quality_gap(better, of_chosen, of_rejected, worse).sum(), float(len(micro))
        return loss / len(batch.examples), {
            "reward_model/loss": Mean(loss.item(), count),
            "reward_model/accuracy": Mean(is_right(better - worse).sum().item(), count),
            "reward_model/margin": Mean((better - worse).sum().item(), count),
        }

    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        """Accuracy: g(chosen, rejected) is above g(rejected, chosen). Beside it: how often it is above 0,
        and the mean of g of a completion and itself, which should be near 0."""
        better, of_chosen, of_rejected, worse = _gaps(scores)
        margins = better - worse
        further = {
            "above zero": (better > 0).float().mean().item(),
            "of itself": ((of_chosen + of_rejected) / 2).mean().item(),
        }
        name = self.config.score.objectives[0]
        return {name: Judged(agreement(margins), pair_calibration(margins), further)}

    def shown(self, example: Example, scores: Tensor) -> dict[str, Any]:
        return shown_pair(example, float(scores[0, 0] - scores[3, 0]))


def _gaps(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g(w, l), g(w, w), g(l, l) and g(l, w), each `[P]`, from the scores `[4 P, 1]`."""
    better, of_chosen, of_rejected, worse = unflatten(scores[:, 0], 0, (-1, 4)).unbind(-1)
    return better, of_chosen, of_rejected, worse
