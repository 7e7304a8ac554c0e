"""`ranking`: the best of several completions in front, by the policy gradient of a ranking's utility.

    {"prompt": ..., "completions": ["text", ...], "relevance": [0, 1, ...]}

Rankings of a prompt's completions are sampled from their scores and compared with each other
(algos/reward_model/ranking.py). Difference from Neural PG-RANK (arXiv:2310.04407): the score of a completion
is read from one text of prompt and completion, not from two embeddings. The paper does not say how many
rankings are sampled; later work on the same policy takes 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algos.reward_model.ranking import expected_first, ndcg, ranking_loss, sample_rankings
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.completions import completion_ids
from rlhf.data.pairs import Example, number_of
from rlhf.data.preferences import completion_text
from rlhf.distributed.world import derive_seed
from rlhf.evaluation.calibration import pair_calibration
from rlhf.metrics import Mean, Metrics
from rlhf.plugins import load_plugin
from rlhf.reward_model.kinds.base import Judged, agreement
from rlhf.reward_model.learner import Batch, TrainedKind
from rlhf.reward_model.model import RewardModel, Scored
from rlhf.torch_typed import numbers, pieces
from rlhf.types import Prompt

NDCG = "ndcg"


class Ranking(TrainedKind):
    columns = ("completions", "relevance")

    def __init__(self, config: RewardModelConfig) -> None:
        """Raises ValueError: the utility cannot be imported."""
        super().__init__(config)
        self.section = config.score.ranking
        self._own: Callable[[list[float]], Any] | None = None
        if self.section.utility != NDCG:
            self._own = load_plugin(self.section.utility)

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        given, relevance = prompt.columns["completions"], prompt.columns["relevance"]
        if not isinstance(given, list) or len(cast(list[object], given)) < 2:
            raise ValueError(f"{where}: completions must be a list of two or more, got {given!r:.80}")
        texts = [completion_text(where, "completions", text) for text in cast(list[object], given)]
        if not isinstance(relevance, list) or len(cast(list[object], relevance)) != len(texts):
            raise ValueError(
                f"{where}: relevance must be a list of {len(texts)} numbers, one for each completion, got "
                f"{relevance!r:.80}"
            )
        labels = [number_of(where, "each relevance", value) for value in cast(list[object], relevance)]
        if len(set(labels)) == 1:
            raise ValueError(
                f"{where}: all completions have the relevance {labels[0]:g}, so none comes first"
            )
        if self._own is None and min(labels) < 0:
            raise ValueError(f"{where}: nDCG needs relevances of 0 or more, got {min(labels):g}")
        ids = tuple(completion_ids(tokenizer, text) for text in texts)
        return Example(prompt, tuple(texts), ids, tuple(labels))

    def loss(
        self, model: RewardModel, scored: Scored, micro: Sequence[Example], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        section, losses, gained = self.section, list[Tensor](), 0.0
        of_each = pieces(scored.scores[:, 0] / section.temperature, [len(e.completions) for e in micro])
        for scores, example in zip(of_each, micro, strict=True):
            # by line, so that neither microbatches nor ranks change what is sampled
            seed = derive_seed(self.config.seed, "ranking", batch.step, example.prompt.id)
            rankings = sample_rankings(scores, section.samples, torch.Generator().manual_seed(seed))
            utilities = self.utilities(torch.tensor(example.labels)[rankings.cpu()]).to(scores)
            losses.append(ranking_loss(scores, rankings, utilities, section.top))
            gained += utilities.mean().item()
        loss, count = torch.stack(losses).sum(), float(len(micro))
        return loss / len(batch.examples), {
            "reward_model/loss": Mean(loss.item(), count),
            "reward_model/utility": Mean(gained, count),
        }

    def utilities(self, relevance: Tensor) -> Tensor:
        """The utility of each ranking, from its relevances in ranked order `[N, n]`, in float64.

        Raises ValueError: a function of the user returns no finite number.
        """
        if self._own is None:
            return ndcg(relevance.double(), self.section.top)
        found = [self._own(numbers(row[: self.section.top])) for row in relevance]
        where = f"score.ranking.utility = {self.section.utility}"
        values = [number_of(where, "what it returns", value) for value in found]
        return torch.tensor(values, dtype=torch.float64)

    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        """Accuracy over pairs of one prompt whose relevances differ; beside it nDCG@1 and the utility."""
        ahead: list[Tensor] = []
        first: list[float] = []
        gained: list[float] = []
        of_each = pieces(scores[:, 0], [len(e.completions) for e in examples])
        for s, example in zip(of_each, examples, strict=True):
            relevance = torch.tensor(example.labels)
            better, worse = (relevance[:, None] > relevance).nonzero().unbind(-1)
            ahead.append(s[better] - s[worse])
            if self._own is None:
                first.append(expected_first(s, relevance))
            gained.append(self.utilities(relevance[s.argsort(descending=True)][None]).item())
        margins = torch.cat(ahead)
        further = {"utility": sum(gained) / len(gained)}
        if first:
            further["ndcg@1"] = sum(first) / len(first)
        name = self.config.score.objectives[0]
        return {name: Judged(agreement(margins), pair_calibration(margins), further)}
