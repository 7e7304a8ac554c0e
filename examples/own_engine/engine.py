"""A rollout engine of your own: a minimal implementation of the protocol in rollout/engine.py.

It computes the whole sequence again for each token, so it is slow but simple. The log-probs that it reports
are those of the distribution that it samples from; the probe after every weight sync compares them with the
learner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.rollout.engine import PauseMode, RolloutRequest, SyncReport, WeightSource
from rlhf.rollout.learner_module import sampling_mode
from rlhf.types import Completion, FinishReason, VersionSpan


class SlowEngine:
    """Holds the learner's own module, so updated weights are there without being sent."""

    def __init__(self, model: nn.Module, *, eos_token_ids: Sequence[int]) -> None:
        self.model: Any = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: list[RolloutRequest] = []
        self.version = 0

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        self.waiting += requests

    def poll(self, timeout: float | None = None) -> list[Completion]:
        """The group of one request; [] when no request is left."""
        if not self.waiting:
            return []
        request = self.waiting.pop(0)
        # the learner uses another attention; `sampling_mode` restores the module afterwards
        with sampling_mode(self.model, "sdpa"):
            return [self._sample(request, index) for index in range(request.params.n)]

    def _sample(self, request: RolloutRequest, index: int) -> Completion:
        params, stop = request.params, self.eos_token_ids.union(request.params.stop_token_ids)
        assert not params.truncates, "this engine does not truncate"
        # a seed for each sample, so that its tokens do not depend on what else is sampled
        generator = torch.Generator().manual_seed(params.seed + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < params.max_tokens and not (tokens and tokens[-1] in stop):
            ids = torch.tensor([[*request.prompt.token_ids, *tokens]], device=self.model.device)
            logits = self.model(ids).logits[0, -1].float().cpu()
            scores = (logits / (params.temperature or 1.0)).log_softmax(-1)
            if params.temperature:
                token = int(torch.multinomial(scores.exp(), 1, generator=generator))
            else:
                token = int(scores.argmax())
            tokens.append(token)
            logprobs.append(float(scores[token]))
        return Completion(
            prompt_id=request.prompt.id,
            index=index,
            token_ids=tuple(tokens),
            rollout_logprobs=tuple(logprobs),
            finish_reason=FinishReason.STOP if tokens[-1] in stop else FinishReason.LENGTH,
            versions=(VersionSpan(self.version, 0, len(tokens)),),
        )

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        assert source.module is self.model
        self.version = version
        return SyncReport(version=version, seconds=0.0, bytes=0)

    def pause(self, mode: PauseMode) -> None:
        """Between two polls nothing is being decoded: waiting requests are dropped, or go on waiting."""
        if mode == "abort":
            self.waiting.clear()

    def resume(self) -> None: ...

    def release(self) -> None: ...

    def close(self) -> None:
        self.waiting.clear()
