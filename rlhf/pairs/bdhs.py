"""Pairs from a model that sees less of its images: the data's answer is chosen, what it makes up rejected.

BDHS, bias-driven hallucination sampling (arXiv:2407.02477, algorithm 1). For each answer of the data:

1. Each image token stays visible if a uniform number is at least rho; the others are hidden from attention.
2. The answer is written once more, sentence by sentence: the model gets the data's earlier sentences and the
   first words of this one, and writes on to a full stop. Errors stay local, since no sentence follows another
   that was made up. A sentence that begins with yes or no has them exchanged in one of two cases.
3. If the result is less similar to the data's answer than a threshold, it is taken. Else it is tried again
   with other hidden tokens; the last try writes the whole answer by itself, and is taken whatever comes.

Differences from the paper: 1. similarity is by n-grams where the user names no embedder; the paper's is
all-mpnet-base-v2, so its threshold of 0.97 means another thing. 2. A sentence is cut between words.
3. "Nobody" does not begin with no. 4. Noise on images, the other way of the paper, is not here: its answers
tell of blurred images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

from transformers import PreTrainedModel

from rlhf.config.rollout import RolloutConfig
from rlhf.inputs import Inputs
from rlhf.models.pretrained import decoded
from rlhf.models.vision.hidden import hidden_from_attention
from rlhf.pairs.files import Made, Pair, PairsError
from rlhf.pairs.sentences import beginning, ends_sentence, exchange_yes_and_no, sentences_of
from rlhf.pairs.similarity import Similarity
from rlhf.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams
from rlhf.types import FinishReason, Group, Prompt

TRIES = "tries"
UNGUIDED = "pairs of the last try, which wrote the whole answer by itself"
EXCHANGED = "pairs in which yes and no were exchanged"
CUT = "pairs with a sentence cut at rollout.max_completion_tokens"
NO_IMAGE = "the prompt has no image"
NOTHING = "the model wrote nothing"


@dataclass(frozen=True, slots=True)
class Hiding:
    """How rejected answers are made."""

    rho: float = 0.99
    """Share of image tokens that is hidden, on average: each is by itself."""
    threshold: float = 0.97
    """An answer at least as similar to the data's as this is tried again."""
    tries: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise PairsError(f"--rho: the share of hidden image tokens is from 0 to 1, got {self.rho:g}")
        if self.tries < 1:
            raise PairsError(f"--tries: there is at least 1 try, got {self.tries}")


@dataclass(frozen=True, slots=True)
class Written:
    """What one try gave."""

    text: str
    cut: bool = False
    """Whether a sentence reached the limit of tokens."""
    exchanged: bool = False
    """Whether a yes or no was exchanged."""


@runtime_checkable
class Writer(Protocol):
    """Writes on while some image tokens are hidden."""

    def image_places(self, prompt: Prompt) -> list[int]:
        """Where the image tokens of a prompt stand."""
        ...

    def write(self, prompt: Prompt, begin: str, hidden: Sequence[int], seed: int, *, whole: bool) -> Written:
        """What is written after `begin`, to the end of a sentence, or with `whole` of the answer."""
        ...


class BlindWriter:
    """Writes on with image tokens hidden from a model's attention; `engine` is an `hf`, on `model`."""

    def __init__(
        self, model: PreTrainedModel, engine: RolloutEngine, inputs: Inputs, rollout: RolloutConfig
    ) -> None:
        assert inputs.processor is not None
        self.model, self.engine, self.rollout = model, engine, rollout
        self.tokenizer, self.image_token_id = inputs.tokenizer, inputs.processor.image_token_id

    @cached_property
    def _full_stops(self) -> tuple[int, ...]:
        """The tokens that end a sentence."""
        size = len(cast(Any, self.tokenizer))
        pieces: list[str] = cast(Any, self.tokenizer).batch_decode([[i] for i in range(size)])
        return tuple(i for i, piece in enumerate(pieces) if ends_sentence(piece))

    def image_places(self, prompt: Prompt) -> list[int]:
        return [place for place, token in enumerate(prompt.token_ids) if token == self.image_token_id]

    def write(self, prompt: Prompt, begin: str, hidden: Sequence[int], seed: int, *, whole: bool) -> Written:
        encode = cast(Any, self.tokenizer)
        ids = cast(list[int], encode(begin, add_special_tokens=False)["input_ids"]) if begin else []
        section = self.rollout
        params = SamplingParams(
            n=1,
            max_tokens=section.max_completion_tokens,
            seed=seed,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            min_p=section.min_p,
            stop_token_ids=section.stop_token_ids if whole else (*section.stop_token_ids, *self._full_stops),
        )
        places = tuple(self.image_places(prompt))
        asked = replace(prompt, token_ids=(*prompt.token_ids, *ids), image_places=places)
        self.engine.submit([RolloutRequest(asked, params)])
        with hidden_from_attention(self.model, hidden):
            [completion] = self.engine.poll()
        # some tokenizers write the space between two words only where both are decoded together
        before, text = (decoded(self.tokenizer, i) for i in (ids, [*ids, *completion.token_ids]))
        text = (
            text[len(before) :] if text.startswith(before) else decoded(self.tokenizer, completion.token_ids)
        )
        return Written(text, cut=completion.finish_reason == FinishReason.LENGTH)


class Hallucinator:
    """Makes the pair of each answer: it depends on the answer, its number, the seed and the model alone."""

    def __init__(
        self,
        golds: Sequence[Group],
        writer: Writer,
        similarity: Similarity,
        hiding: Hiding,
        seed: int,
    ) -> None:
        self.golds, self.writer, self.similarity = golds, writer, similarity
        self.hiding, self.seed = hiding, seed

    def make(self, number: int) -> Made:
        """The pair of answer `number`."""
        group = self.golds[number]
        prompt = group.prompt
        if not prompt.images:
            return Made(dropped={NO_IMAGE: 1})
        gold = max(group.trajectories, key=lambda t: -math.inf if t.reward is None else t.reward).text
        tries = 0
        while True:
            rng = random.Random(f"{self.seed}/{number}/{tries}")
            tries += 1
            is_last = tries == self.hiding.tries
            written = self._try(prompt, gold, rng, guided=not is_last)
            similarity = self.similarity(written.text, gold)
            if is_last or similarity < self.hiding.threshold:
                break
        if not written.text.strip():
            return Made(dropped={NOTHING: 1}, counts={TRIES: tries})
        found = {"similarity": round(similarity, 6), "tries": tries}
        pair = Pair(prompt.content, gold, written.text, prompt.images, {**prompt.columns, **found})
        counts = {
            TRIES: tries,
            UNGUIDED: int(is_last),
            EXCHANGED: int(written.exchanged),
            CUT: int(written.cut),
        }
        return Made((pair,), counts=counts)

    def settings(self) -> dict[str, Any]:
        """What the pairs depend on, beside model and data."""
        return {"maker": "bdhs", "seed": self.seed, **asdict(self.hiding)}

    def _try(self, prompt: Prompt, gold: str, rng: random.Random, *, guided: bool) -> Written:
        places = self.writer.image_places(prompt)
        hidden = [place for place in places if rng.random() < self.hiding.rho]
        if not guided:
            return self.writer.write(prompt, "", hidden, rng.getrandbits(31), whole=True)
        text, before, cut, exchanged = "", "", False, False
        for sentence in sentences_of(gold):
            other = exchange_yes_and_no(sentence) if rng.random() < 0.5 else sentence
            kept = beginning(other, rng)
            written = self.writer.write(prompt, before + kept, hidden, rng.getrandbits(31), whole=False)
            new = (kept + written.text).rstrip()
            # a space between two sentences, where the model has written none
            space = sentence[: len(sentence) - len(sentence.lstrip())]
            text += new if not text or new[:1].isspace() else space + new
            cut |= written.cut
            exchanged |= other != sentence and bool(kept)
            before += sentence
        return Written(text, cut, exchanged)
