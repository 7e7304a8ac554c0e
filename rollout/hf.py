"""The engine `hf`: Hugging Face's `model.generate`, one request at a time; `native` is tested against it.

It takes any causal model that Hugging Face can generate with. The n samples of a prompt are n equal rows,
so there is no padding. A logits processor draws each token by `sampling.sample` and sets the logits of all
others to minus infinity.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.rollout.engine import EngineError, ImageInputs, PauseMode, RolloutRequest, SyncReport, WeightSource
from rlhf.rollout.learner_module import Model, causal_model, exact_attention, sampling_mode, take_weights
from rlhf.rollout.requests import Row, check_requests, rows_of
from rlhf.rollout.sampling import Drawn, RowSampling, sample
from rlhf.types import Completion


class Draw(LogitsProcessor):
    """Draws and records a token for each row; `generate` then takes it, as the only possible one."""

    def __init__(self, sampling: RowSampling) -> None:
        self.drawn: list[Drawn] = []
        self.sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        position = torch.full_like(self.sampling.keys, len(self.drawn))
        drawn = sample(scores, self.sampling, position)
        self.drawn.append(drawn)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn.tokens[:, None], 0.0)


@contextmanager
def _own_generation_config(model: Model, config: GenerationConfig) -> Generator[None]:
    """Replaces the model's own generation config, whose settings (repetition penalty) may change sampling."""
    shipped = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = shipped


class HFEngine:
    """Each `poll` decodes one request and returns its whole group; no cache is kept between polls."""

    _takes_mixtures = False

    def __init__(
        self, model: nn.Module, *, eos_token_ids: Sequence[int], image_inputs: ImageInputs | None = None
    ) -> None:
        self._model, self._image_inputs = causal_model(model), image_inputs
        self._eos_token_ids = tuple(eos_token_ids)
        self._attention = exact_attention(self._model)
        self.use_cache = True
        """Whether keys, values and states of earlier tokens are kept; else each token computes them again."""
        self._waiting: list[RolloutRequest] = []
        self._finished: list[Completion] = []
        self._version = 0
        self._paused = False

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Raises EngineError for a prompt that `check_requests` refuses, and for one in which the policy has
        written a placeholder of an image: `model.generate` would take it for an image."""
        in_flight = [request.prompt.id for request in self._waiting]
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        takes_images = self._image_inputs is not None
        check_requests(
            requests,
            in_flight,
            vocabulary,
            takes_images=takes_images,
            takes_mixtures=self._takes_mixtures,
        )
        for prompt in (request.prompt for request in requests):
            if prompt.images and prompt.image_places is not None:
                marks = prompt.token_ids.count(self._model.config.image_token_id)
                if marks != len(prompt.image_places):
                    raise EngineError(
                        f"prompt {prompt.id!r}: the policy wrote a placeholder of an image itself, which "
                        "engine hf takes for an image: use rollout.engine native or vllm"
                    )
        self._waiting.extend(requests)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """The next group. `timeout` is ignored, since `generate` cannot be interrupted."""
        if self._waiting and not self._finished and not self._paused:
            self._finished = self._generate(self._waiting.pop(0))
        finished, self._finished = self._finished, []
        return finished

    def pause(self, mode: PauseMode) -> None:
        """`abort` ends waiting requests with no tokens, `wait` decodes them, `keep` leaves them waiting."""
        if mode == "abort":
            rows = [row for request in self._waiting for row in self._rows(request)]
            self._finished.extend(row.completion() for row in rows)
            self._waiting = []
        while mode == "wait" and self._waiting:
            self._finished.extend(self._generate(self._waiting.pop(0)))
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Copies the weights, unless the learner's own module is used. Raises ValueError on a mismatch."""
        report = take_weights(self._model, source, version)
        self._version = version
        return report

    def release(self) -> None:
        """Does nothing: no memory is held between polls."""

    def close(self) -> None:
        self._waiting, self._finished = [], []

    def _rows(self, request: RolloutRequest) -> list[Row]:
        return rows_of(request, self._eos_token_ids, self._version)

    def _draw(self, sampling: RowSampling) -> Draw:
        """What draws the tokens of one request's rows."""
        return Draw(sampling)

    def _generate(self, request: RolloutRequest) -> list[Completion]:
        params, device = request.params, self._model.get_input_embeddings().weight.device
        rows = self._rows(request)
        stop_ids = sorted(rows[0].stop_ids)
        config = GenerationConfig(
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=stop_ids or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
        )
        prompts = torch.tensor([request.prompt.token_ids] * params.n, device=device)
        images: Mapping[str, Tensor] = {}
        if request.prompt.images and self._image_inputs is not None:
            images = self._image_inputs.inputs(request.prompt)
        draw = self._draw(
            RowSampling.of([params] * params.n, range(params.n), device, [request.mixture] * params.n)
        )
        with sampling_mode(self._model, self._attention), _own_generation_config(self._model, config):
            self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                **{name: torch.cat([row] * params.n) for name, row in images.items()},
                logits_processor=LogitsProcessorList([draw]),
                use_cache=self.use_cache,
            )
        steps = [drawn.per_row() for drawn in draw.drawn]
        for row, sampled in zip(rows, zip(*steps, strict=True), strict=True):
            # stops at the row's last token: after it the row was padded until all rows had finished
            any(row.append(*drawn) for drawn in sampled)
        return [row.completion() for row in rows]
