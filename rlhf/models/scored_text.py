"""How a completion is written for a reward model of this project: its tokens, and those that are scored.

Training (rlhf/reward_model/kinds/) and the reward `reward_model` write it with the same `Form`, which the
saved model's config.json names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from rlhf.models.pretrained import SCORED_AT_END

SCORED_AT = "scored_at"
STEPS, TWO = "end_of_steps", "end_of_two"

Written = tuple[list[int], list[int]]
"""Token ids, the end-of-sequence token last, and the places among them that are scored."""


class Form(ABC):
    """A way of writing."""

    needs_reference: ClassVar[bool] = False
    """Whether a completion is compared with a second one, the reference."""

    @property
    @abstractmethod
    def entries(self) -> Mapping[str, Any]:
        """Entries of the saved model's config, from which `form_of` makes the form again."""

    @abstractmethod
    def write(self, tokenizer: PreTrainedTokenizerBase, text: str, reference: str = "") -> Written:
        """The tokens of a completion; `reference` counts for forms that need it alone."""


@dataclass(frozen=True, slots=True)
class AtEnd(Form):
    """The text and the end-of-sequence token, which is scored."""

    @property
    def entries(self) -> Mapping[str, Any]:
        return SCORED_AT_END

    def write(self, tokenizer: PreTrainedTokenizerBase, text: str, reference: str = "") -> Written:
        ids = [*_encode(tokenizer, text), _end(tokenizer)]
        return ids, [len(ids) - 1]


@dataclass(frozen=True, slots=True)
class AtSteps(Form):
    """Steps, each tokenised apart with the separator behind it, at whose last token the step is scored.

    The last step has the end-of-sequence token in place of the separator.
    """

    separator: str

    @property
    def entries(self) -> Mapping[str, Any]:
        return {SCORED_AT: STEPS, "step_separator": self.separator}

    def write(self, tokenizer: PreTrainedTokenizerBase, text: str, reference: str = "") -> Written:
        """Parts of nothing but white space are no steps; a text without any step is one step."""
        steps = [part for part in text.split(self.separator) if part.strip()]
        return self.write_steps(tokenizer, steps or [text])

    def ends(self, text: str) -> list[int]:
        """Where each step that `write` scores ends in `text`, in characters: behind its separator, and the
        last one at the end of the text.
        """
        ends, place = list[int](), 0
        for part in text.split(self.separator):
            place += len(part) + len(self.separator)
            ends += [place] if part.strip() else []
        return [*ends[:-1], len(text)]

    def write_steps(self, tokenizer: PreTrainedTokenizerBase, steps: Sequence[str]) -> Written:
        """As `write`, of a text that is cut already."""
        ids: list[int] = []
        places: list[int] = []
        for step in steps[:-1]:
            ids += _encode(tokenizer, step + self.separator)
            places.append(len(ids) - 1)
        ids += [*_encode(tokenizer, steps[-1]), _end(tokenizer)]
        return ids, [*places, len(ids) - 1]


@dataclass(frozen=True, slots=True)
class OfTwo(Form):
    """The completion and then the reference, each with an end-of-sequence token; the second is scored."""

    needs_reference: ClassVar[bool] = True

    @property
    def entries(self) -> Mapping[str, Any]:
        return {SCORED_AT: TWO}

    def write(self, tokenizer: PreTrainedTokenizerBase, text: str, reference: str = "") -> Written:
        end = _end(tokenizer)
        ids = [*_encode(tokenizer, text), end, *_encode(tokenizer, reference), end]
        return ids, [len(ids) - 1]


def form_of(config: Any) -> Form | None:
    """The form that a model's config names; None: the model was not trained by this project."""
    entries: dict[str, Any] = config.to_dict()
    match entries.get(SCORED_AT):
        case "end_of_sequence":
            return AtEnd()
        case "end_of_steps":
            return AtSteps(entries["step_separator"])
        case "end_of_two":
            return OfTwo()
        case _:
            return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _end(tokenizer: Any) -> int:
    return tokenizer.eos_token_id
