"""Second answers: a completion is a second turn behind a first answer and a request to improve it (SRPO).

    prompt      ^user_Capital of Norway?$_^assistant_
    trajectory  Rome.$ _^user_Improve your answer.$_^assistant_ Oslo.$
    loss_mask   000000 0000000000000000000000000000000000000000 111111

(`^` opens a message of the chat template, `$` ends it, `_` is a line end.) The request is a message of the
user. Behind a prompt of text it is the text itself, and the end-of-sequence token of the first answer is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rlhf.environments.conversation import Conversation
from rlhf.types import Group, Prompt, Trajectory


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
        """The prompt of a second answer; its content, which rewards see, is still the first question."""
        return replace(prompt, token_ids=(*prompt.token_ids, *self.asked_again(prompt, answer)))

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
