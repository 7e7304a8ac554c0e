"""`Kind` and `Learner`, what every kind of scores has, and what several of them measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoints.store import Saves
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import Example
from rlhf.distributed.world import World
from rlhf.evaluation.calibration import Bin
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Metrics
from rlhf.models.policy import Policy
from rlhf.models.pretrained import SCORED_AT_END
from rlhf.models.vision.processor import Processor
from rlhf.reward_model.model import RewardModel
from rlhf.torch_typed import integers, numbers
from rlhf.types import Prompt

COMPARED = 2000
"""How many pairs of completions with different labels are compared, at most, for each objective."""


@dataclass(frozen=True, slots=True)
class Judged:
    """How well the scores of one objective agree with held-out data."""

    correct: list[float]
    """1, 0.5 or 0 for each comparison: right, a tie, wrong."""
    bins: list[Bin]
    """Predicted and observed shares or means."""
    further: Mapping[str, float] = field(default_factory=dict[str, float])
    """Other measures by name."""
    counts: bool = True
    """Whether its comparisons are part of the accuracy of the whole model."""


class Learner(ABC):
    """Learns the scores of one kind, from batches of examples, and gives them."""

    model: RewardModel
    optimizer: MasterAdamW
    """Of everything that is trained: what a checkpoint holds of the model."""

    @abstractmethod
    def update(self, examples: Sequence[Example], *, step: int) -> Metrics:
        """One update from the examples of all ranks; each rank computes the gradient of its share."""

    @abstractmethod
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """Scores `[S, K]` of all places, in order, on the CPU. Every rank calls it and gets all of them."""

    @abstractmethod
    def export(self, pad_token_id: int) -> Saves:
        """What rank 0 saves as RUN/model, in `model.dtype` (models/classifier.py)."""

    def told(self) -> Iterator[str]:
        """What a run says of what was learned before the first update."""
        yield from ()


class Kind(ABC):
    """One value of `score.kind`."""

    trains_model: ClassVar[bool] = True
    """Whether the language model below the scores is trained."""
    columns: tuple[str, ...]
    """The columns that a line of the data needs beside the prompt."""

    def __init__(self, config: RewardModelConfig) -> None:
        self.config = config

    @property
    def saved(self) -> Mapping[str, Any]:
        """Entries of the saved model's config.json, which tell the reward `reward_model` how to read it."""
        return SCORED_AT_END

    @abstractmethod
    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The example of a line, whose columns are in `prompt`; errors (ValueError) begin with `where`."""

    @abstractmethod
    def learner(self, policy: Policy, world: World, first: Sequence[Example]) -> Learner:
        """What learns the scores, from the weights of `policy` (in float32) and the examples of `first`."""

    def first(self, tokenizer: PreTrainedTokenizerBase, processor: Processor | None) -> list[Example]:
        """Examples of a file of their own that are learned from once, before the first update."""
        return []

    @abstractmethod
    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        """What held-out `scores` `[S, K]` are worth, by objective. Raises ValueError: nothing can be told."""

    def told(self, examples: Sequence[Example]) -> Iterator[str]:
        """Further lines of `rlhf check`, about the examples to train on."""
        yield from ()

    def shown(self, example: Example, scores: Tensor) -> dict[str, Any] | None:
        """An example as RUN/eval.json shows it, with its `scores` `[s, K]`; None: it shows none."""
        return None


def agreement(margins: Tensor) -> list[float]:
    """1 for each positive margin, 0.5 for a tie, 0 for a negative margin."""
    return numbers(is_right(margins))


def is_right(margins: Tensor) -> Tensor:
    """As `agreement`, as a tensor."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def compared(scores: Tensor, labels: Tensor) -> list[float]:
    """`agreement` of pairs with different labels; both are `[S]`, and NaN is no label."""
    known = (~labels.isnan()).nonzero()[:, 0]
    s, r = scores[known], labels[known]
    # pairs among 200 of a fixed shuffle: all pairs would be too many
    shuffled = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    correct: list[float] = []
    for i, j in combinations(integers(shuffled)[:200], 2):
        if r[i] != r[j] and len(correct) < COMPARED:
            correct += agreement(((s[i] - s[j]) * (r[i] - r[j]))[None])
    return correct


def labels_of(examples: Sequence[Example], like: Tensor) -> Tensor:
    """The labels of examples that have equally many, `[E, L]`."""
    return torch.tensor([e.labels for e in examples], dtype=like.dtype, device=like.device)


def shown_pair(example: Example, margin: float) -> dict[str, Any]:
    """A pair as RUN/eval.json shows it; `margin` is by how much the chosen completion is ahead."""
    content = example.prompt.content
    return {
        "prompt": content if isinstance(content, str) else str(content[-1]["content"]),
        "completion": f"{example.texts[0]!r} rather than {example.texts[1]!r}",
        "reward": margin,
        "right": margin > 0,
    }
