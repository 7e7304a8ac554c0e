"""Token ids that a model has no embedding for: the first one in the data is named, with its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.config.section import ConfigError
from rlhf.data.completions import OfflineDataset
from rlhf.data.prompts import PromptDataset
from rlhf.data.texts import Text
from rlhf.models.pretrained import text_settings


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Everything of a run that is tokenised."""

    prompts: Iterable[PromptDataset]
    offline: Iterable[OfflineDataset]
    texts: Iterable[Text]
    ends: tuple[int, ...]
    """The end-of-sequence tokens."""

    def named(self) -> Iterator[tuple[str, Iterable[int]]]:
        """A name for messages, and token ids, of each text."""
        yield "the end-of-sequence tokens (rollout.stop_token_ids among them)", self.ends
        for dataset in self.prompts:
            yield from ((prompt.id, prompt.token_ids) for prompt in dataset.prompts)
        for group in (group for dataset in self.offline for group in dataset.groups):
            for trajectory in group.trajectories:
                yield f"a completion of {group.prompt.id}", trajectory.token_ids
        for number, text in enumerate(self.texts, start=1):
            yield f"text {number} of ptx.path", (*text.given, *text.learned)


def check_tokens(
    path: str,
    model: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    found: Iterable[tuple[str, Iterable[int]]],
) -> None:
    """Raises ConfigError where a token is beyond the embedding of the model at `path`."""
    size = cast(int | None, text_settings(model).get("vocab_size"))
    if size is None:
        return
    for name, token_ids in found:
        largest = max(token_ids, default=0)
        if largest >= size:
            known: Any = tokenizer
            raise ConfigError(
                f"{name}: token {largest} ({known.convert_ids_to_tokens(largest)!r}) is beyond the {size} "
                f"embeddings of {path}, whose tokenizer has {len(known)} tokens: resize the model "
                "(resize_token_embeddings, then train what is new), or take the tokenizer it came with"
            )
