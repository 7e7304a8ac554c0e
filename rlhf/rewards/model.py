"""A reward model: any sequence classifier in the Hugging Face layout, scoring in its worker in batches.

    reward:
      functions:
        - {path: reward_model, params: {model: runs/reward/model}, batch: 16, memory_gib: 16, timeout: 60}

What `task: reward_model` saved is given what it was trained on: prompt, completion and an end-of-sequence
token, also where the completion was cut. Any other one gets the conversation as its chat template writes it.

One label is one number; several labels are several objectives with the names of the model's `id2label`, as in
multi-objective GRPO (arXiv:2503.21819), whose weights the paper does not give: `weights` of the function sets
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf.rewards.builtin import Completion, completion_text

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

        from rlhf.models.pretrained import SCORED_AT_END, load_tokenizer, local_or_hub, pad_token_of

        torch.set_num_threads(threads)
        library: Any = transformers
        path = local_or_hub(model)
        settings: Any = library.AutoConfig.from_pretrained(path)
        found: list[str] = settings.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in found):
            raise ValueError(
                f"{model} is no reward model: expected a sequence classifier, got {found or 'nothing'}"
            )
        self.tokenizer: Any = load_tokenizer(model)
        self.tokenizer.truncation_side = "left"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = library.AutoModelForSequenceClassification
        self.model: Any = kind.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
        if self.model.config.pad_token_id is None:
            # without one a classifier takes the last token of the row, padding included, for its answer
            self.model.config.pad_token_id = pad_token_of(self.tokenizer)
        self.ends = settings.to_dict().items() >= SCORED_AT_END.items()
        self.max_tokens, self.transform = max_tokens, transform
        labels: dict[int, str] = self.model.config.id2label
        self.labels = [labels[i] for i in range(self.model.config.num_labels)]

    def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[Completion]
    ) -> list[float] | list[dict[str, float]]:
        """Scores of prompts with their completions, one forward pass for all."""
        import torch

        rows = [self._tokens(p, c) for p, c in zip(prompts, completions, strict=True)]
        longest, pad = max(map(len, rows)), self.model.config.pad_token_id
        inputs = {
            "input_ids": [[*row, *[pad] * (longest - len(row))] for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        }
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(**{k: torch.tensor(v, device=device) for k, v in inputs.items()}).logits
        scores: Any = logits.float().sigmoid() if self.transform == "sigmoid" else logits.float()
        if len(self.labels) == 1:
            return scores[:, 0].tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in scores.tolist()]

    def _tokens(self, prompt: Messages, completion: Completion) -> list[int]:
        plain = isinstance(prompt, str)
        if not self.ends:
            # a chat template writes the special tokens itself
            text = f"{prompt}{completion}" if plain else self._write([*prompt, *completion])
            limits = {"truncation": True, "max_length": self.max_tokens}
            return self.tokenizer(text, add_special_tokens=plain, **limits)["input_ids"]
        before = prompt if plain else self._write(prompt, add_generation_prompt=True)
        ids = self.tokenizer(before, add_special_tokens=plain)["input_ids"]
        ids += self.tokenizer(completion_text(completion), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id][-self.max_tokens :]

    def _write(self, messages: Sequence[Any], **how: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)
