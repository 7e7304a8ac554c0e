"""Reward `reward_model`: a sequence classifier in the Hugging Face layout scores completions in batches.

    reward:
      functions:
        - {path: reward_model, params: {model: runs/reward/model}, batch: 16, memory_gib: 16, timeout: 60}

A model saved by `task: reward_model` gets the input that it was trained on: prompt, completion and an
end-of-sequence token, even where the completion was truncated. Any other model gets the conversation as its
chat template writes it.

A model with one label returns a number. A model with several labels returns several objectives, named by its
`id2label`, as in multi-objective GRPO (arXiv:2503.21819). The paper does not give their weights; the setting
`weights` of the function does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf.rewards.builtin import Completion, completion_text

Messages = str | Sequence[Mapping[str, Any]]


class RewardModel:
    """Loaded once per worker; the function's setting `batch` is the number of samples of a forward pass."""

    def __init__(
        self,
        model: str,
        max_tokens: int = 2048,
        transform: Literal["none", "sigmoid"] = "none",
        dtype: Literal["auto", "float32", "bfloat16"] = "float32",
        threads: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads `model`, a folder or a name on the hub, on the GPU if the worker sees one.

        `max_tokens`: inputs that are longer lose their beginning. `transform`: applied to each score.
        `dtype`: `auto` is bfloat16 on a GPU, on a CPU the faster of both types.
        `threads`: CPU threads of this worker. `trust_remote_code`: lets Python code that the model brings run
        in this worker.

        Raises ModelError when there is no such model or it lacks weights, and ValueError when it is not a
        sequence classifier.
        """
        import torch

        from rlhf.compute_dtype import resolve_dtype
        from rlhf.models import pretrained

        if trust_remote_code:
            pretrained.trust(model)
        torch.set_num_threads(threads)
        settings: Any = pretrained.load_model_config(model)
        found: list[str] = settings.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in found):
            raise ValueError(
                f"{model} is no reward model: expected a sequence classifier, got {found or 'nothing'}"
            )
        self.tokenizer: Any = pretrained.load_tokenizer(model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        computed = getattr(torch, resolve_dtype(dtype, device))
        self.model: Any = pretrained.load_classifier(model, computed, device)
        if self.model.config.pad_token_id is None:
            # without a padding token a classifier reads its score at the last token of the row, padding
            # included
            self.model.config.pad_token_id = pretrained.pad_token_of(self.tokenizer)
        self.scored_at_end = settings.to_dict().items() >= pretrained.SCORED_AT_END.items()
        self.max_tokens, self.transform = max_tokens, transform
        labels: dict[int, str] = self.model.config.id2label
        self.labels = [labels[i] for i in range(self.model.config.num_labels)]

    def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[Completion]
    ) -> list[float] | list[dict[str, float]]:
        """Score of each completion (by objective, if there are several labels); one forward pass for all."""
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
        from rlhf.models.chat import encode_texts

        plain = isinstance(prompt, str)
        encode: Any = self.tokenizer
        if not self.scored_at_end and plain:
            (ids,) = encode_texts(self.tokenizer, [f"{prompt}{completion}"], ends=True, most=self.max_tokens)
            return ids
        if not self.scored_at_end:
            # a chat template writes the special tokens itself
            text = self._write([*prompt, *completion], opens=False)
            return encode(text, add_special_tokens=False)["input_ids"][-self.max_tokens :]
        if plain:
            (ids,) = encode_texts(self.tokenizer, [prompt])
        else:
            ids = encode(self._write(prompt, opens=True), add_special_tokens=False)["input_ids"]
        ids += encode(completion_text(completion), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id][-self.max_tokens :]

    def _write(self, messages: Sequence[Any], *, opens: bool) -> str:
        from rlhf.models.chat import of_text, without_nulls, write_chat

        return write_chat(self.tokenizer, of_text(without_nulls(list(messages))), opens=opens)
