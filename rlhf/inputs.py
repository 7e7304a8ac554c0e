"""`Inputs`: all that a run reads before it loads weights: tokenizer, datasets, reward functions, algorithm.

Read by `rlhf.preflight.load.load_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.data.completions import OfflineDataset
from rlhf.data.prompts import PromptDataset
from rlhf.data.revision import Reviser
from rlhf.data.texts import Text
from rlhf.environments.conversation import Conversation
from rlhf.environments.protocol import Environments
from rlhf.models.vision.processor import Processor
from rlhf.rewards.scoring import Rewards


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a policy run reads, except weights."""

    tokenizer: PreTrainedTokenizerBase
    model: PretrainedConfig
    """The model's config.json."""
    train: PromptDataset
    eval: PromptDataset | None
    """Held-out prompts (`data.eval`) that are sampled from and scored by the reward functions."""
    rewards: Rewards
    algorithm: Algorithm
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion."""
    texts: tuple[Text, ...] = ()
    """Texts for the language-model loss of the section `ptx`."""
    processor: Processor | None = None
    """The image processor and its tokenizer; None for a model that takes text alone."""
    offline: OfflineDataset | None = None
    """Completions in `data.train`; None where `data.mode` is online."""
    environments: Environments | None = None
    """What answers the policy between its turns; None: a completion is one turn."""
    conversation: Conversation | None = None
    """What writes the turns of episodes; None where there are no environments."""
    eval_pairs: OfflineDataset | None = None
    """Held-out completions (`data.eval`) of a run with a preference algorithm; None where the file has
    prompts alone."""

    def reviser(self, improve_prompt: str | None) -> Reviser | None:
        """Asks for second answers with these words; None without any."""
        if improve_prompt is None:
            return None
        return Reviser(self.tokenizer, improve_prompt, frozenset(self.eos_token_ids))
