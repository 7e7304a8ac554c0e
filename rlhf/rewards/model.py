"""Reward `reward_model`: a sequence classifier in the Hugging Face layout scores completions in batches.

    reward:
      functions:
        - {path: reward_model, params: {model: runs/reward/model}, batch: 16, memory_gib: 16, timeout: 60}

A model saved by `task: reward_model` (docs/reward_models.md) gets the input that it was trained on: prompt,
completion and an end-of-sequence token, even where the completion was truncated; of an episode the completion
is its last message, and those before it stand behind the prompt. Any other model gets the conversation as its
chat template writes it.

A model with one label returns a number. A model with several labels returns several objectives, named by its
`id2label`, as in multi-objective GRPO (arXiv:2503.21819). The paper does not give their weights; the setting
`weights` of the function does. A gated model returns its objectives times the gate's weights, which add up to
its score, and logs these weights. A model of steps returns the worst, mean or last of its steps' scores, or
each of them as the reward of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.rewards.builtin import Completion, completion_text
from rlhf.rewards.workers.return_values import Steps

Messages = str | Sequence[Mapping[str, Any]]
DIGITS = 4
"""Digits of the numbers that are logged."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input of a model that was trained by this project."""

    ids: list[int]
    places: list[int]
    """Where scores are read."""
    prompt_end: int
    """Where the last token of the prompt stands; negative: it was cut away."""
    images: Any = None
    """The prompt's images (`Images`)."""


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
        of_steps: Literal["min", "mean", "last", "each"] = "min",
    ) -> None:
        """Loads `model`, a folder or a name on the hub, on the GPU if the worker sees one.

        `max_tokens`: inputs that are longer lose their beginning. `transform`: applied to each score.
        `dtype`: `auto` is bfloat16 on a GPU, on a CPU the faster of both types.
        `threads`: CPU threads of this worker. `trust_remote_code`: lets Python code that the model brings run
        in this worker. `of_steps`: which score a model of steps gives, that of the worst step, the mean,
        that of the last one, or `each`, to the tokens that end the steps.

        Raises ModelError when there is no such model or it lacks weights, and ValueError when it is not a
        sequence classifier, or a gated one whose scores are to be transformed.
        """
        import torch

        from rlhf.models import pretrained

        if trust_remote_code:
            pretrained.trust(model)
        torch.set_num_threads(threads)
        self.max_tokens, self.transform, self.of_steps = max_tokens, transform, of_steps
        self._load(model, dtype)
        labels: dict[int, str] = self.model.config.id2label
        self.labels = [labels[i] for i in range(self.model.config.num_labels)]

    def _load(self, model: str, dtype: Literal["auto", "float32", "bfloat16"]) -> None:
        import torch

        from rlhf.compute_dtype import resolve_dtype
        from rlhf.models import pretrained
        from rlhf.models.classifier import load_classifier
        from rlhf.models.heads import Gate
        from rlhf.models.policy import Trunk
        from rlhf.models.scored_text import form_of
        from rlhf.models.vision.processor import load_processor

        settings: Any = pretrained.load_model_config(model)
        _check_classifies(model, settings)
        self.tokenizer: Any = pretrained.load_tokenizer(model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        computed = getattr(torch, resolve_dtype(dtype, device))
        self.model: Any
        self.model, head = load_classifier(model, settings, computed, device)
        self.head: Any = self.model.score if head is None else head
        self.trunk: Any = None
        """What reads text with images; None: the model is a classifier of text."""
        if head is not None:
            self.trunk = Trunk(self.model, layout="padded", processor=load_processor(model, self.tokenizer))
        if self.trunk is None and self.model.config.pad_token_id is None:
            # without a padding token a classifier reads its score at the last token of the row, padding
            # included
            self.model.config.pad_token_id = pretrained.pad_token_of(self.tokenizer)
        self.form = form_of(settings)
        self.gate = Gate.load(model, settings, device)
        if self.gate is not None and self.transform != "none":
            raise ValueError(
                f"{model} is a gated model, whose score is a sum: leave out transform = {self.transform}"
            )

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the dataset that this model needs."""
        return ("reference",) if self.form is not None and self.form.needs_reference else ()

    @property
    def gives_steps(self) -> bool:
        """Whether it gives rewards to single steps."""
        from rlhf.models.scored_text import AtSteps

        return isinstance(self.form, AtSteps) and self.of_steps == "each"

    def __call__(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Completion],
        reference: Sequence[Completion] | None = None,
        images: Sequence[Sequence[Any]] | None = None,
        log_extra: Callable[[str, Sequence[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> list[float] | list[dict[str, float]] | list[Steps]:
        """Score of each completion (by objective, if there are several labels; or by step); one forward pass
        for all.

        `reference`: the completions that a model of gaps compares with. `images`: those of each prompt.
        `log_extra`, `log_metric`: log what the score is made of, the gate's weights or the scores and the
        number of steps.
        """
        import torch

        pictures = images if images is not None else [()] * len(prompts)
        if self.trunk is None and any(pictures):
            raise ValueError("prompts have images, and this reward model reads text alone")
        if self.form is None:
            inputs = self._padded([self._tokens(p, c) for p, c in zip(prompts, completions, strict=True)])
            with torch.inference_mode():
                return self._returned(self._transformed(self.model(**inputs).logits))
        others = [""] * len(prompts)
        if self.form.needs_reference:
            if reference is None:
                raise ValueError("this model compares completions: give what with in `reference`")
            if any(not isinstance(c, str) and len(c) > 1 for c in (*completions, *reference)):
                raise ValueError(
                    "this model compares answers to one prompt, which episodes of several turns are not"
                )
            others = [completion_text(r) for r in reference]
        texts = [completion_text(c) for c in completions]
        before = [_up_to_last(p, c) for p, c in zip(prompts, completions, strict=True)]
        rows = [self._row(*row) for row in zip(before, texts, others, pictures, strict=True)]
        with torch.inference_mode():
            states = self._states(rows)
            found = [self._transformed(self.head(ends)) for _, ends in states]
            if self.gate is None:
                return self._of_steps(texts, found, log_extra, log_metric)
            weights = self.gate(torch.stack([prompt for prompt, _ in states]).float())
            self._log_gate(weights.tolist(), log_extra, log_metric)
            return self._returned(weights * torch.cat(found))

    def _states(self, rows: Sequence[Row]) -> list[tuple[Any, Any]]:
        """Of each row the hidden state `[H]` at the end of the prompt, and those `[s, H]` that are scored."""
        import torch

        from rlhf.models.packing import pack

        if self.trunk is None:
            hidden = self.model.base_model(**self._padded([row.ids for row in rows])).last_hidden_state
            return [(h[row.prompt_end], h[row.places]) for row, h in zip(rows, hidden, strict=True)]
        device = self.model.device
        prompts = [torch.tensor(row.ids[: row.prompt_end + 1], device=device) for row in rows]
        # one token is appended: the state that would predict it is that at the end
        behind = [torch.tensor([*row.ids[row.prompt_end + 1 :], row.ids[-1]], device=device) for row in rows]
        packed = pack(prompts, [[tokens] for tokens in behind], [row.images for row in rows])
        of_each = torch.split(self.trunk.hidden(packed), [len(tokens) for tokens in behind])
        return [
            (h[0], h[[place - row.prompt_end for place in row.places]])
            for row, h in zip(rows, of_each, strict=True)
        ]

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        import torch

        longest, pad, device = max(map(len, rows)), self.model.config.pad_token_id, self.model.device
        inputs = {
            "input_ids": [[*row, *[pad] * (longest - len(row))] for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        }
        return {k: torch.tensor(v, device=device) for k, v in inputs.items()}

    def _transformed(self, logits: Any) -> Any:
        return logits.float().sigmoid() if self.transform == "sigmoid" else logits.float()

    def _returned(self, scores: Any) -> list[float] | list[dict[str, float]]:
        """Scores `[B, K]` as a reward function returns them."""
        if len(self.labels) == 1:
            return scores[:, 0].tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in scores.tolist()]

    def _of_steps(
        self,
        texts: Sequence[str],
        found: Sequence[Any],
        log_extra: Callable[[str, Sequence[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float] | list[dict[str, float]] | list[Steps]:
        """What is returned for the scores `[s, K]` of each completion; there is one unless it has steps."""
        import torch

        from rlhf.models.scored_text import AtSteps

        if not isinstance(self.form, AtSteps):
            return self._returned(torch.cat(list(found)))
        of_steps: list[list[float]] = [scores[:, 0].tolist() for scores in found]
        if log_extra is not None:
            log_extra("steps", [[round(x, DIGITS) for x in scores] for scores in of_steps])
        if log_metric is not None:
            log_metric("steps", sum(map(len, of_steps)) / len(of_steps))
        if self.of_steps == "each":
            ends = map(self.form.ends, texts)
            return [list(zip(e, scores, strict=True)) for e, scores in zip(ends, of_steps, strict=True)]
        reduce: dict[str, Callable[[Any], Any]] = {
            "min": lambda scores: scores.amin(0),
            "mean": lambda scores: scores.mean(0),
            "last": lambda scores: scores[-1],
        }
        return self._returned(torch.stack([reduce[self.of_steps](scores) for scores in found]))

    def _log_gate(
        self,
        weights: Sequence[Sequence[float]],
        log_extra: Callable[[str, Sequence[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        if log_extra is not None:
            rounded = ([round(w, DIGITS) for w in row] for row in weights)
            log_extra("gate", [dict(zip(self.labels, row, strict=True)) for row in rounded])
        if log_metric is not None:
            for name, of_one in zip(self.labels, zip(*weights, strict=True), strict=True):
                log_metric(f"gate_{name}", sum(of_one) / len(of_one))

    def _row(self, prompt: Messages, text: str, reference: str, pictures: Sequence[Any]) -> Row:
        """Raises ValueError where more than the beginning of a plain score's input would be cut away."""
        assert self.form is not None
        before, images = self._prompt(prompt, pictures)
        behind, places = self.form.write(self.tokenizer, text, reference)
        lost = max(0, len(before) + len(behind) - self.max_tokens)
        row = Row(
            [*before, *behind][lost:],
            [len(before) + place - lost for place in places],
            len(before) - 1 - lost,
            images,
        )
        whole = self.trunk is not None and lost
        if row.places[0] < 0 or (self.gate is not None and row.prompt_end < 0) or whole:
            raise ValueError(
                f"prompt and completion have {len(before) + len(behind)} tokens, more than max_tokens = "
                f"{self.max_tokens} of reward_model: raise it in params"
            )
        return row

    def _prompt(self, prompt: Messages, pictures: Sequence[Any]) -> tuple[list[int], Any]:
        """The tokens of a prompt, and its images if it has any."""
        from rlhf.models.chat import encode_texts
        from rlhf.types import Images

        if isinstance(prompt, str):
            return encode_texts(self.tokenizer, [prompt])[0], None
        if self.trunk is None:
            written = self._write(prompt, opens=True)
            return self.tokenizer(written, add_special_tokens=False)["input_ids"], None
        processor, name = self.trunk.vision.processor, "a prompt"
        _, sources, ids = processor.prompt(name, prompt, list(pictures) or None, Path())
        return ids, Images(name, sources) if sources else None

    def _tokens(self, prompt: Messages, completion: Completion) -> list[int]:
        """The input of a model that others trained."""
        from rlhf.models.chat import encode_texts

        if isinstance(prompt, str):
            text = f"{prompt}{completion}"
            return encode_texts(self.tokenizer, [text], ends=True, most=self.max_tokens)[0]
        # a chat template writes the special tokens itself
        written = self._write([*prompt, *completion], opens=False)
        return self.tokenizer(written, add_special_tokens=False)["input_ids"][-self.max_tokens :]

    def _write(self, messages: Sequence[Any], *, opens: bool) -> str:
        from rlhf.models.chat import of_text, without_nulls, write_chat

        return write_chat(self.tokenizer, of_text(without_nulls(list(messages))), opens=opens)


def _up_to_last(prompt: Messages, completion: Completion) -> Messages:
    """What the last message answers: the prompt, and of an episode its messages before that one."""
    if isinstance(prompt, str) or isinstance(completion, str):
        return prompt
    return [*prompt, *completion[:-1]]


def _check_classifies(model: str, settings: Any) -> None:
    """Raises ValueError: by its config the model is no sequence classifier, and has no score head beside."""
    from rlhf.models.pretrained import SCORE_FILE

    names: list[str] = settings.architectures or []
    if SCORE_FILE not in settings.to_dict() and not any(
        name.endswith("ForSequenceClassification") for name in names
    ):
        raise ValueError(
            f"{model} is no reward model: expected a sequence classifier, got {names or 'nothing'}"
        )
