"""A saved reward model as a reward function, all completions of a step in one batch.

    reward:
      functions:
        - path: examples/capitals/score.py:Score
          params: {model: runs/reward_model/model}
          batch: step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Score:
    """Loaded once a worker. A text is scored at its end-of-sequence token, as the model was trained.

    A model of several scores gives each under its name.
    """

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.names: list[str] = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> list[float] | list[dict[str, float]]:
        rows = [self._tokens(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        pad = self.model.config.pad_token_id
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
        device = self.model.device
        scores = self.model(input_ids=token_ids.to(device), attention_mask=mask.long().to(device)).logits
        if len(self.names) == 1:
            return scores[:, 0].tolist()
        return [dict(zip(self.names, row, strict=True)) for row in scores.tolist()]

    def _tokens(self, prompt: Any, completion: Sequence[int]) -> torch.Tensor:
        """A completion that was cut ends too, and so too early."""
        plain, end = isinstance(prompt, str), self.tokenizer.eos_token_id
        text = prompt
        if not plain:
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        before = self.tokenizer(text, add_special_tokens=plain)["input_ids"]
        return torch.tensor([*before, *(i for i in completion if i != end), end])
