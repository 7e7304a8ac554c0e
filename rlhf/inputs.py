"""What a run reads before weights are loaded: tokenizer, datasets, rewards, algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.data.completions import OfflineDataset
from rlhf.data.prompts import PromptDataset
from rlhf.data.texts import Text
from rlhf.models.vision.processor import Processor
from rlhf.rewards.scoring import Rewards


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads, weights excepted."""

    tokenizer: PreTrainedTokenizerBase
    model: PretrainedConfig
    train: PromptDataset
    eval: PromptDataset | None
    rewards: Rewards
    algorithm: Algorithm
    eos_token_ids: tuple[int, ...]
    texts: tuple[Text, ...] = ()
    """What `ptx` mixes in."""
    processor: Processor | None = None
    """Of a model that can see."""
    offline: OfflineDataset | None = None
    """The completions that `train`'s prompts come with, when they are learned from."""
