"""Second answers: a completion is a second turn behind a first answer and a request to improve it (SRPO).

    prompt      ^user_Capital of Norway?$_^assistant_
    trajectory  Rome.$ _^user_Improve your answer.$_^assistant_ Oslo.$
    loss_mask   000000 0000000000000000000000000000000000000000 111111

(`^` opens a message of the chat template, `$` ends it, `_` is a line end.) The request is a message of the
user. Behind a prompt of text it is the text itself, and the end-of-sequence token of the first answer is left
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from rlhf.config.data import DataConfig
from rlhf.data.completions import OfflineDataset, completion_ids
from rlhf.data.preferences import completion_text
from rlhf.data.prompts import PromptDataset
from rlhf.environments.conversation import Conversation
from rlhf.types import Group, Prompt, Trajectory

T = TypeVar("T")
REFERENCE = "reference"
"""The column in which rewards find the answer that was to be improved."""


@dataclass(frozen=True)
class Reviser:
    """`improve_prompt`: what asks for the second answer (`data.improve_prompt`); `end_token_ids`: tokens that
    end an answer."""

    tokenizer: PreTrainedTokenizerBase
    improve_prompt: str
    end_token_ids: frozenset[int]

    def asked_again(self, prompt: Prompt, answer: Sequence[int]) -> tuple[int, ...]:
        """What stands between a prompt and a second answer: the first one, and the request to improve it.

        Raises ChatError: the chat template cannot write a second question.
        """
        answer = tuple(answer)
        if isinstance(prompt.content, str):
            ended = bool(answer) and answer[-1] in self.end_token_ids
            encoded = cast(Any, self.tokenizer)(self.improve_prompt, add_special_tokens=False)["input_ids"]
            return (*(answer[:-1] if ended else answer), *encoded)
        chat = Conversation(self.tokenizer, self.end_token_ids)
        asked = [{"role": "user", "content": self.improve_prompt}]
        return (*answer, *chat.observation(asked, answer[-1] if answer else -1).token_ids)

    def prompt(self, prompt: Prompt, answer: Sequence[int]) -> Prompt:
        """The prompt of a second answer, behind this answer alone; its content, which rewards see, is still
        the first question."""
        question = prompt.token_ids[: prompt.question_tokens]
        token_ids = (*question, *self.asked_again(prompt, answer))
        return replace(prompt, token_ids=token_ids, question_tokens=len(question))

    def revised(self, group: Group) -> Group:
        """A pair and the four second answers that it has: after the first completion the first and the
        second one, and after the second completion the same."""
        assert len(group.trajectories) == 2
        second = [
            self._second(group.prompt, first, again)
            for first in group.trajectories
            for again in group.trajectories
        ]
        return replace(group, trajectories=(*group.trajectories, *second))

    def _second(self, prompt: Prompt, first: Trajectory, again: Trajectory) -> Trajectory:
        behind = self.asked_again(prompt, first.token_ids)
        count = len(again.token_ids)
        return replace(
            again,
            token_ids=(*behind, *again.token_ids),
            loss_mask=(False,) * len(behind) + again.loss_mask,
            turns=(0,) * len(behind) + (1,) * count,
            # nobody has sampled it as a second answer
            rollout_logprobs=None,
            versions=(),
            candidates=None,
        )


@dataclass(frozen=True, slots=True)
class Improvement:
    """Prompts that ask to improve an answer of the data (`data.improve_column`), as PIT learns from them."""

    reviser: Reviser
    data: DataConfig

    def prompts(self, dataset: PromptDataset) -> PromptDataset:
        """Raises ValueError: a line has no answer in the column, or there is a column `reference` too."""
        made = [self._prompt(prompt, dataset) for prompt in dataset.prompts]
        kept = self._short_enough(made, made, dataset)
        columns = _columns(dataset)
        return replace(
            dataset, prompts=tuple(kept), columns=columns, skipped=dataset.skipped + len(made) - len(kept)
        )

    def completions(self, dataset: OfflineDataset) -> OfflineDataset:
        """As `prompts`, of a dataset with completions."""
        made = [replace(g, prompt=self._prompt(g.prompt, dataset)) for g in dataset.groups]
        kept = self._short_enough(made, (g.prompt for g in made), dataset)
        columns = _columns(dataset)
        return replace(
            dataset, groups=tuple(kept), columns=columns, skipped=dataset.skipped + len(made) - len(kept)
        )

    def _prompt(self, prompt: Prompt, dataset: PromptDataset | OfflineDataset) -> Prompt:
        column, where = self.data.improve_column, f"{dataset.source}, {prompt.id}"
        assert column is not None
        if column not in prompt.columns:
            raise ValueError(
                f"{where}: data.improve_column is {column!r}, which is not among the columns "
                f"{', '.join(prompt.columns) or 'none'}: name the one with the answer to improve"
            )
        if column != REFERENCE and REFERENCE in prompt.columns:
            raise ValueError(
                f"{where}: rewards see the answer of data.improve_column as {REFERENCE!r}, but there is a "
                "column of that name too: rename it"
            )
        text = completion_text(where, column, prompt.columns[column])
        asked = self.reviser.prompt(prompt, completion_ids(self.reviser.tokenizer, text))
        return replace(asked, columns={**prompt.columns, REFERENCE: text})

    def _short_enough(
        self, items: Sequence[T], prompts: Iterable[Prompt], dataset: PromptDataset | OfflineDataset
    ) -> list[T]:
        """Those whose prompt, with the answer and the request, is within `data.max_prompt_tokens`."""
        limit = self.data.max_prompt_tokens
        long = [p if len(p.token_ids) > limit else None for p in prompts]
        first = next((p for p in long if p is not None), None)
        if first is not None and (self.data.long_prompts == "refuse" or None not in long):
            raise ValueError(
                f"{dataset.source}, {first.id}: with the answer to improve and data.improve_prompt the "
                f"prompt has {len(first.token_ids)} tokens, more than data.max_prompt_tokens = {limit}; "
                "raise the limit"
            )
        return [item for item, too_long in zip(items, long, strict=True) if too_long is None]


def _columns(dataset: PromptDataset | OfflineDataset) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*dataset.columns, REFERENCE)))
