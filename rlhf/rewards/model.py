"""A reward model: any sequence classifier in the Hugging Face layout, scoring in its worker in batches.

    reward:
      functions:
        - {path: reward_model, params: {model: runs/reward/model}, batch: 16, memory_gib: 16, timeout: 60}

One label is one number; several labels are several objectives with the names of the model's `id2label`, as in
multi-objective GRPO (arXiv:2503.21819), whose weights the paper does not give: `weights` of the function sets
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf.rewards.builtin import Completion

Messages = str | Sequence[Mapping[str, Any]]


class RewardModel:
    """Loaded once a worker; `batch` of the function is how many samples go through it at once."""

    def __init__(
        self,
        model: str,
        max_tokens: int = 2048,
        transform: Literal["none", "sigmoid"] = "none",
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int = 1,
    ) -> None:
        """`max_tokens` cuts the beginning of what is longer; `threads` are those of this process.

        Raises ModelError when there is no such model, and ValueError when it is no classifier.
        """
        import torch
        import transformers

        from rlhf.pretrained import load_tokenizer, local_or_hub

        torch.set_num_threads(threads)
        library: Any = transformers
        path = local_or_hub(model)
        found: list[str] = library.AutoConfig.from_pretrained(path).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in found):
            raise ValueError(
                f"{model} is no reward model: expected a sequence classifier, got {found or 'nothing'}"
            )
        self.tokenizer: Any = load_tokenizer(model)
        self.tokenizer.truncation_side = "left"
        self.tokenizer.padding_side = "right"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = library.AutoModelForSequenceClassification
        self.model: Any = kind.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
        if self.model.config.pad_token_id is None:
            # without one a classifier takes the last token of the row, padding included, for its answer
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.max_tokens, self.transform = max_tokens, transform
        labels: dict[int, str] = self.model.config.id2label
        self.labels = [labels[i] for i in range(self.model.config.num_labels)]

    def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[Completion]
    ) -> list[float] | list[dict[str, float]]:
        """Scores of whole conversations: prompt and completion, written by the model's own chat template."""
        import torch

        texts = [self._write(p, c) for p, c in zip(prompts, completions, strict=True)]
        # a chat template writes the special tokens itself
        special = isinstance(prompts[0], str)
        if any(isinstance(prompt, str) != special for prompt in prompts):
            raise ValueError("prompts of one batch must be all text or all messages, got both: set batch: 1")
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special,
            truncation=True,
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**encoded).logits.float()
        scores: Any = logits.sigmoid() if self.transform == "sigmoid" else logits
        if len(self.labels) == 1:
            return scores[:, 0].tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in scores.tolist()]

    def _write(self, prompt: Messages, completion: Completion) -> str:
        if isinstance(prompt, str):
            return prompt + str(completion)
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
