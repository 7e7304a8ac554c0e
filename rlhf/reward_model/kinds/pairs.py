"""`pairs`: which of two completions is better, by the Bradley-Terry loss.

{"prompt": ..., "chosen": ..., "rejected": ...}         and, if the data has it, "margin": 0.5

mean of  -log sigmoid(s_chosen - s_rejected - margin)
         + center_coef (s_chosen + s_rejected)^2
+ lm_coef * mean of -logprob over the chosen tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algos.reward_model.losses import bradley_terry, centring
from rlhf.config.reward_model import ScoreConfig
from rlhf.data.completions import completion_ids
from rlhf.data.pairs import Example, number_of
from rlhf.data.preferences import completion_text
from rlhf.evaluation.calibration import pair_calibration
from rlhf.metrics import Mean, Metrics
from rlhf.models.packing import Packed
from rlhf.reward_model.kinds.base import Judged, agreement, is_right, labels_of, shown_pair
from rlhf.reward_model.learner import Batch, TrainedKind
from rlhf.reward_model.model import RewardModel, Scored
from rlhf.types import Prompt

SIDES = ("chosen", "rejected")


class Pairs(TrainedKind):
    columns = SIDES

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        texts = two_texts(prompt, where)
        margin = margin_of(prompt, where, self.config.score)
        return Example(prompt, texts, tuple(completion_ids(tokenizer, text) for text in texts), (margin,))

    def loss(
        self, model: RewardModel, scored: Scored, micro: Sequence[Example], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        section = self.config.score
        chosen, rejected = scored.scores[0::2, 0], scored.scores[1::2, 0]
        loss = bradley_terry(chosen, rejected, labels_of(micro, chosen)[:, 0]).sum()
        count = float(len(micro))
        metrics: Metrics = {
            "reward_model/loss": Mean(loss.item(), count),
            "reward_model/accuracy": Mean(is_right(chosen - rejected).sum().item(), count),
            "reward_model/margin": Mean((chosen - rejected).sum().item(), count),
            "reward_model/score": Mean(scored.scores.sum().item(), 2 * count),
        }
        if section.center_coef:
            loss = loss + section.center_coef * centring(chosen, rejected).sum()
        total = loss / len(batch.examples)
        if self.config.lm_coef:
            wanted = scored.real & _chosen_tokens(scored.packed)
            nll = -model.likelihood(scored, wanted).sum()
            metrics["reward_model/lm_loss"] = Mean(nll.item(), float(wanted.sum()))
            total = total + self.config.lm_coef * nll / sum(len(e.completions[0]) for e in batch.examples)
        return total, metrics

    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        # rows alternate: chosen, rejected
        margins = scores[0::2, 0] - scores[1::2, 0]
        return {self.config.score.objectives[0]: Judged(agreement(margins), pair_calibration(margins))}

    def told(self, examples: Sequence[Example]) -> Iterator[str]:
        margins = [e.labels[0] for e in examples]
        if any(margins):
            mean, name = sum(margins) / len(margins), self.config.score.margin_column
            yield f"margins      from the column {name!r}, {mean:.3g} on average"

    def shown(self, example: Example, scores: Tensor) -> dict[str, Any]:
        return shown_pair(example, float(scores[0, 0] - scores[1, 0]))


def two_texts(prompt: Prompt, where: str) -> tuple[str, str]:
    """The chosen and the rejected text of a line. Raises ValueError: they are the same, or no texts."""
    chosen, rejected = (completion_text(where, name, prompt.columns[name]) for name in SIDES)
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text, {chosen!r:.80}")
    return chosen, rejected


def margin_of(prompt: Prompt, where: str, score: ScoreConfig) -> float:
    """The margin of a line; 0 where the data has no column of margins. Raises ValueError: it has, by name,
    another one."""
    name = score.margin_column
    if name is None:
        return 0.0
    if name in prompt.columns:
        return number_of(where, f"the margin in column {name!r}", prompt.columns[name])
    if name != ScoreConfig.model_fields["margin_column"].default:
        raise ValueError(
            f"{where}: score.margin_column is {name!r}, which is not among the columns "
            f"{', '.join(prompt.columns)}; name one of them, or set it to null"
        )
    return 0.0


def _chosen_tokens(packed: Packed) -> Tensor:
    """bool `[N]`: the tokens of the chosen completion, which is the first of each pair."""
    flags: list[Any] = [
        torch.full((length,), i == 0) for span in packed.spans for i, length in enumerate(span.completions)
    ]
    return torch.cat(flags).to(packed.targets.device)
