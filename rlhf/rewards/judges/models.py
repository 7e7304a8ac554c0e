"""Judges that are models on this machine: `pair_model` says A or B, `pair_rewards` compares two scores.

    reward:
      preference: {path: pair_model, params: {model: runs/pm/model}, batch: 16, memory_gib: 16, timeout: 60}

`pair_model` is the pairwise preference model of RLHFlow (pair-pm, arXiv:2405.07863 section 2): a causal
language model, fine-tuned to write the one token A or B behind a text with both completions. P(A) = p(A) /
(p(A) + p(B)). Differs from their code: the conversation is written as lines `role: content`, and a pair that
does not fit is an error, never cut. To train one, imitate such texts: `algorithm: sft` with the two orders of
each pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from rlhf.rewards.builtin import Completion, as_text, compared_texts
from rlhf.rewards.model import Messages, RewardModel
from rlhf.rewards.remote import filled

TEMPLATE = "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n"


class PairModel:
    """Loaded once per worker; the setting `batch` is the number of comparisons of a forward pass."""

    def __init__(
        self,
        model: str,
        template: str = TEMPLATE,
        letters: tuple[str, str] = ("A", "B"),
        max_tokens: int = 4096,
        dtype: Literal["auto", "float32", "bfloat16"] = "float32",
        threads: int = 1,
    ) -> None:
        """Loads `model`, a folder or a name on the hub, on the GPU if the worker sees one.

        `template`: the text, which is a user's message where the tokenizer has a chat template. `letters`:
        what the model writes if the first, or the second, is better; each has to be one token (" A" is not
        "A"). `dtype`, `threads`: as for `reward_model`.

        Raises ModelError when there is no such model, and ValueError for a letter of several tokens or a
        template without {first} or {second}.
        """
        import torch

        from rlhf.compute_dtype import resolve_dtype
        from rlhf.models.pretrained import load_model, load_tokenizer

        if "{first}" not in template or "{second}" not in template:
            raise ValueError("the template must have {first} and {second}, or nothing is compared")
        torch.set_num_threads(threads)
        self.tokenizer: Any = load_tokenizer(model)
        found = [self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
        for letter, ids in zip(letters, found, strict=True):
            if len(ids) != 1:
                raise ValueError(f"letters: {letter!r} must be one token of {model}, but it is {len(ids)}")
        self.letters = [ids[0] for ids in found]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_model(model, device, getattr(torch, resolve_dtype(dtype, device)))
        self.template, self.max_tokens = template, max_tokens

    def __call__(
        self, prompts: Sequence[Messages], completions: Sequence[Sequence[Completion]]
    ) -> list[float]:
        """P(the first is better) of each pair; one forward pass for all. Raises ValueError for a long one."""
        import torch

        rows = [self._tokens(p, *pair) for p, pair in zip(prompts, completions, strict=True)]
        longest = max(map(len, rows))
        # behind its end, where no token of a causal model sees it, so any token will do
        padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        # the model gives logits of the same places of all rows, here of all at which any row ends
        ends = sorted({len(row) - 1 for row in rows})
        place = [ends.index(len(row) - 1) for row in rows]
        device = self.model.device
        with torch.inference_mode():
            output = self.model(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                logits_to_keep=torch.tensor(ends, device=device),
            )
            both: Any = output.logits.float()[range(len(rows)), place][:, self.letters]
        return both.softmax(-1)[:, 0].tolist()

    def _tokens(self, prompt: Messages, first: Completion, second: Completion) -> list[int]:
        from rlhf.models.chat import encode_texts, write_chat

        texts = compared_texts(first, second)
        fields = {"prompt": as_text(prompt), "first": texts[0], "second": texts[1]}
        text = filled(self.template, fields)
        if self.tokenizer.chat_template:
            chat = write_chat(self.tokenizer, [{"role": "user", "content": text}], opens=True)
            ids: list[int] = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        else:
            (ids,) = encode_texts(self.tokenizer, [text])
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"two completions and their prompt have {len(ids)} tokens, more than max_tokens = "
                f"{self.max_tokens} of pair_model: raise it in params, or lower rollout.max_completion_tokens"
            )
        return ids


class PairRewards:
    """P = sigmoid((score of the first - score of the second) / temperature), by a reward model
    (Bradley-Terry).

    Both orders say the same, so `both_orders: false` saves half of the work.
    """

    def __init__(
        self,
        model: str,
        temperature: float = 1.0,
        max_tokens: int = 2048,
        dtype: Literal["auto", "float32", "bfloat16"] = "float32",
        threads: int = 1,
    ) -> None:
        """`model`, `max_tokens`, `dtype`, `threads`: as for `reward_model`.

        Raises what `reward_model` does, and ValueError for a model with several scores or a temperature of 0.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.scorer = RewardModel(model, max_tokens=max_tokens, dtype=dtype, threads=threads)
        self.temperature = temperature
        if len(self.scorer.labels) != 1:
            raise ValueError(f"{model} gives {len(self.scorer.labels)} scores; two completions need one each")

    def __call__(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Sequence[Completion]],
        images: Sequence[Sequence[Any]] | None = None,
    ) -> list[float]:
        """P(the first is better) of each pair; one forward pass for all. `images`: those of each prompt."""
        form = self.scorer.form
        both = None if images is None else [i for i in images for _ in range(2)]
        if form is not None and form.needs_reference:
            return self._by_gaps(prompts, completions, both)
        scores: Any = self.scorer(
            [p for p in prompts for _ in range(2)], [c for pair in completions for c in pair], images=both
        )
        return [
            _sigmoid((first - second) / self.temperature)
            for first, second in zip(scores[::2], scores[1::2], strict=True)
        ]

    def _by_gaps(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Sequence[Completion]],
        images: Sequence[Sequence[Any]] | None,
    ) -> list[float]:
        """sigmoid(g(first, second) - g(second, first)), as a model of gaps learns it."""
        gaps: Any = self.scorer(
            [p for p in prompts for _ in range(2)],
            [c for pair in completions for c in pair],
            reference=[c for first, second in completions for c in (second, first)],
            images=images,
        )
        pairs = zip(gaps[::2], gaps[1::2], strict=True)
        return [_sigmoid((first - second) / self.temperature) for first, second in pairs]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, x))))
