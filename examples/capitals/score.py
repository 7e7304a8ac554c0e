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
    """Loaded once a worker. A text is scored at its end-of-sequence token, as the model was trained."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        end = self.tokenizer.eos_token_id
        rows: list[torch.Tensor] = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            before = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([*before, *(i for i in ids if i != end), end]))
        pad = self.model.config.pad_token_id
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
        scores = self.model(input_ids=token_ids, attention_mask=mask.long()).logits[:, 0]
        return [float(score) for score in scores]
