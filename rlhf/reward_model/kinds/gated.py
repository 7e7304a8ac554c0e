"""`gated`: objectives that are read off a frozen model by ridge regression, weighed by the prompt (ArmoRM).

    data.ratings   {"prompt": ..., "completion": "text", "ratings": {"correct": 1, "polite": null}}
    data.train     {"prompt": ..., "chosen": ..., "rejected": ...}

    r_i  = w_i . (state at the end of the completion)             ridge regression on data.ratings, once
    r'_i = r_i - lam_i r_verbosity                                lam_i from the completions of data.ratings
    g    = scale * softmax(MLP(state at the end of the prompt) / temperature)
    score = sum_i g_i r'_i                                        the gate learns from pairs (Bradley-Terry)

Hidden states are computed once each and kept in memory: 4 H bytes for each prompt and each completion.

Differences from ArmoRM (arXiv:2406.12845 and its code): 1. no dropout in the gate; 2. the gate is trained on
the corrected r', on which its scores are built; the published script trains it on r; 3. weights are fitted to
all rows once their strength is chosen; 4. the reference set of the verbosity is data.ratings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algos.reward_model.attributes import fit_attributes, verbosity_penalties, without_verbosity
from rlhf.algos.reward_model.losses import bradley_terry
from rlhf.checkpoints.store import Saves
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.pairs import Example, load_examples
from rlhf.distributed.world import World
from rlhf.evaluation.calibration import pair_calibration
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Mean, Metrics, merge
from rlhf.models.heads import Gate, scores
from rlhf.models.policy import Policy
from rlhf.models.vision.processor import Processor
from rlhf.reward_model.frozen_states import FrozenStates
from rlhf.reward_model.kinds.base import Judged, Kind, Learner, agreement, is_right, labels_of, shown_pair
from rlhf.reward_model.kinds.pairs import Pairs
from rlhf.reward_model.kinds.ratings import Ratings
from rlhf.reward_model.model import RewardModel
from rlhf.torch_typed import seeded
from rlhf.types import Prompt

MEAN = "mean of the objectives"


class Gated(Kind):
    trains_model = False

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        self._pairs = Pairs(config)
        self.columns = self._pairs.columns

    def example(self, prompt: Prompt, where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
        return self._pairs.example(prompt, where, tokenizer)

    def first(self, tokenizer: PreTrainedTokenizerBase, processor: Processor | None) -> list[Example]:
        data = self.config.data
        assert data.ratings is not None
        return load_examples(data.ratings, data, Ratings(self.config), tokenizer, processor)

    def told(self, examples: Sequence[Example]) -> Iterator[str]:
        yield from self._pairs.told(examples)

    def learner(self, policy: Policy, world: World, first: Sequence[Example]) -> GatedLearner:
        policy.freeze(getattr(torch, self.config.model.dtype))
        model = RewardModel(policy, len(self.config.score.objectives))
        states = FrozenStates(model, self.config.learner.microbatch_tokens, world)
        return GatedLearner(states, self.config, world, first)

    def judge(self, scores: Tensor, examples: Sequence[Example]) -> dict[str, Judged]:
        """Of the score; beside it of the objectives' mean and of each objective, which do not count."""
        margins = scores[0::2] - scores[1::2]
        names = ["score", MEAN, *self.config.score.objectives]
        return {
            name: Judged(agreement(margins[:, i]), pair_calibration(margins[:, i]), counts=i == 0)
            for i, name in enumerate(names)
        }

    def shown(self, example: Example, scores: Tensor) -> dict[str, Any]:
        return shown_pair(example, float(scores[0, 0] - scores[1, 0]))


class GatedLearner(Learner):
    """The objectives, fitted when it is made; then it learns the gate, from pairs."""

    def __init__(
        self, states: FrozenStates, config: RewardModelConfig, world: World, rated: Sequence[Example]
    ) -> None:
        """`states`: of a frozen model with a head for each objective, whose weights are set here; `rated`:
        the examples to fit them to. Raises ValueError: too few ratings of an objective.
        """
        self.config, self.world, self.states = config, world, states
        self.objectives = config.score.objectives
        self.model = states.model
        ends = torch.cat([found.ends for found in states.of(rated, keep=False)])
        self.notes = self._fit(ends, labels_of(rated, ends))
        shape = config.score.gate
        size = self.model.head.in_features
        with seeded(config.seed):
            gate = Gate(size, len(self.objectives), shape.width, shape.layers, shape.temperature)
        self.gate = gate.to(world.device)
        self.optimizer = MasterAdamW(self.gate, torch.float32, config.learner, config.steps)

    def _fit(self, states: Tensor, ratings: Tensor) -> list[str]:
        """Sets the weights of the objectives' head; returns what was chosen, in words."""
        generator = torch.Generator().manual_seed(self.config.seed)
        try:
            weights, strengths = fit_attributes(states, ratings, generator)
        except ValueError as error:
            named = ", ".join(f"{i}: {name}" for i, name in enumerate(self.objectives))
            raise ValueError(f"{self.config.data.ratings}: {error} (attributes: {named})") from None
        notes = [f"{n}: ridge strength {a:g}" for n, a in zip(self.objectives, strengths, strict=True)]
        if (verbosity := self.config.score.verbosity) is not None:
            index = self.objectives.index(verbosity)
            lam = verbosity_penalties(states.double() @ weights.mT, index)
            weights = without_verbosity(weights, lam, index)
            notes = [f"{note}, less {x:g} of {verbosity}" for note, x in zip(notes, lam, strict=True)]
        with torch.no_grad():
            self.model.head.weight.copy_(weights)
        return notes

    def told(self) -> Iterator[str]:
        yield from self.notes

    def update(self, examples: Sequence[Example], *, step: int) -> Metrics:
        # every rank asks for the states of all: they share the passes
        self.states.of(examples)
        mine = examples[self.world.rank :: self.world.size]
        weights, rated = self._gate_and_ratings(mine)
        margins = self._margins(weights, rated)
        loss = bradley_terry(margins, torch.zeros_like(margins), labels_of(mine, margins)[:, 0]).sum()
        torch.autograd.backward([loss / len(examples)])
        count = float(len(mine))
        metrics: Metrics = {
            "reward_model/loss": Mean(loss.item(), count),
            "reward_model/accuracy": Mean(is_right(margins).sum().item(), count),
            "reward_model/margin": Mean(margins.sum().item(), count),
        }
        metrics |= {
            f"reward_model/gate/{name}": Mean(weights[:, i].sum().item(), count)
            for i, name in enumerate(self.objectives)
        }
        return merge([metrics, self.optimizer.step(step, self.world)])

    @torch.no_grad()
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """`[S, 2 + K]`: the score, the mean of the objectives, and each objective."""
        weights, rated = self._gate_and_ratings(examples)
        score = (weights[:, None] * rated).sum(-1, keepdim=True)
        return torch.cat([score, rated.mean(-1, keepdim=True), rated], -1).flatten(0, 1).cpu()

    def _gate_and_ratings(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The gate's weights `[P, K]` and the objectives `[P, 2, K]` of the completions of P pairs."""
        states = self.states.of(examples)
        prompts = torch.stack([s.prompt for s in states])
        ends = torch.stack([s.ends for s in states])
        with torch.no_grad():
            rated = scores(self.model.head, ends)
        return self.gate(prompts), rated

    def _margins(self, weights: Tensor, rated: Tensor) -> Tensor:
        """By how much the chosen completion of each pair is ahead, `[P]`."""
        return (weights * (rated[:, 0] - rated[:, 1])).sum(-1)

    def export(self, pad_token_id: int) -> GatedModel:
        return GatedModel(self.model, self.gate, self.objectives, pad_token_id)


class GatedModel:
    """What is saved: a classifier of the objectives, and beside it the gate."""

    def __init__(self, model: RewardModel, gate: Gate, objectives: Sequence[str], pad_token_id: int) -> None:
        self.gate = gate
        self.classifier: Saves = model.export(objectives, pad_token_id, gate.entries)

    def save_pretrained(self, save_directory: str) -> None:
        self.classifier.save_pretrained(save_directory)
        self.gate.save(save_directory)
