"""`tree.evaluator: self`: the model marks completions itself, from A to D (iTool's self-evaluation).

Differences from the authors' code: 1. the mark is read at one place, the first token of the model's answer,
where theirs looks for it at seven; 2. the words are this project's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.models.chat import encode_texts, write_chat
from rlhf.pairs.files import PairsError
from rlhf.pairs.tree_search import self_evaluation
from rlhf.types import Group, Trajectory

MARKS = "ABCD"
QUESTION = """{question}

The right answer:
{gold}

An answer:
{answer}

Compare the answer with the right one: the name of the function, the number of its parameters, their names,
and the values and their types.
A: it is right. B: it means the same. C: it is wrong in part. D: it is wrong.
Answer with one letter."""


class SelfEvaluation:
    """Values completions by the marks that `model` gives them. Raises PairsError: marks are not one token."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, gold_column: str) -> None:
        self.model, self.tokenizer, self.gold_column = model, tokenizer, gold_column
        self.is_chat = bool(cast(Any, tokenizer).chat_template)
        # behind "Mark:" a letter has a blank before it
        texts = list(MARKS) if self.is_chat else [f" {mark}" for mark in MARKS]
        ids = cast(Any, tokenizer)(texts, add_special_tokens=False)["input_ids"]
        # a tokenizer of characters makes two tokens of " A", of which the last one tells
        self.marks = [own[-1] for own in ids]
        self.before = list(ids[0][:-1])
        if len(set(self.marks)) < len(MARKS) or any(list(own[:-1]) != self.before for own in ids):
            raise PairsError(
                f"tree.evaluator: self reads one of the marks {', '.join(MARKS)}, but the model's tokenizer "
                f"makes {[list(own) for own in ids]} of them; use tree.evaluator=rewards"
            )

    def __call__(self, group: Group) -> list[float | None]:
        question, gold = _question(group), str(group.prompt.columns[self.gold_column])
        return [self._mark(question, gold, trajectory) for trajectory in group.trajectories]

    @torch.no_grad()
    def _mark(self, question: str, gold: str, trajectory: Trajectory) -> float:
        asked = QUESTION.format(question=question, gold=gold, answer=trajectory.text)
        if self.is_chat:
            text = write_chat(self.tokenizer, [{"role": "user", "content": asked}])
            ids = cast(Any, self.tokenizer)(text, add_special_tokens=False)["input_ids"]
        else:
            [ids] = encode_texts(self.tokenizer, [f"{asked}\nMark:"])
        device = next(self.model.parameters()).device
        logits = self.model(torch.tensor([[*ids, *self.before]], device=device)).logits[0, -1]
        return self_evaluation(logits[self.marks].float().softmax(-1).tolist())


def _question(group: Group) -> str:
    content: Any = group.prompt.content
    return content if isinstance(content, str) else "\n".join(str(m["content"]) for m in content)
