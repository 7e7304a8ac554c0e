"""`PrefixedEngine`: an engine whose completions begin with tokens that are given for their requests.

A request with a prefix is sampled behind prompt and prefix, and what comes back is the whole completion,
prefix included, so that whoever scores completions or plays episodes sees the policy's whole turn. Its
log-probs are None, because the policy was not asked for the prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rlhf.rollout.engine import (
    KeepsSamples,
    PauseMode,
    RolloutEngine,
    RolloutRequest,
    SyncReport,
    WeightSource,
)
from rlhf.types import Completion, FinishReason


class PrefixedEngine:
    """`end_token_ids`: a prefix that ends with one of these is a whole completion, and nothing is sampled.

    `prefixes` has, by the id of a request, the tokens that its completions begin with; they count among
    `max_tokens`. A request leaves it with its last completion.
    """

    def __init__(self, engine: RolloutEngine, end_token_ids: Iterable[int]) -> None:
        self.engine, self.end_token_ids = engine, frozenset(end_token_ids)
        self.prefixes: dict[str, tuple[int, ...]] = {}
        self._missing: dict[str, int] = {}
        self._whole: list[Completion] = []

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        sampled: list[RolloutRequest] = []
        for request in requests:
            prefix = self.prefixes.get(request.prompt.id)
            if not prefix:
                sampled.append(request)
                continue
            room = request.params.max_tokens - len(prefix)
            ended = prefix[-1] in (self.end_token_ids | {*request.params.stop_token_ids})
            if ended or room < 1:
                reason = FinishReason.STOP if ended else FinishReason.LENGTH
                self._whole += [
                    Completion(request.prompt.id, index, prefix, None, reason, versions=())
                    for index in range(request.params.n)
                ]
                del self.prefixes[request.prompt.id]
                continue
            self._missing[request.prompt.id] = request.params.n
            prompt = replace(request.prompt, token_ids=request.prompt.token_ids + prefix)
            sampled.append(replace(request, prompt=prompt, params=replace(request.params, max_tokens=room)))
        if sampled:
            self.engine.submit(sampled)

    def poll(self, timeout: float | None = None) -> list[Completion]:
        if self._whole:
            ready, self._whole = self._whole, []
            return ready
        return [self._with_prefix(completion) for completion in self.engine.poll(timeout)]

    def _with_prefix(self, completion: Completion) -> Completion:
        name = completion.prompt_id
        prefix = self.prefixes.get(name)
        if not prefix:
            return completion
        self._missing[name] -= 1
        if not self._missing[name]:
            del self._missing[name], self.prefixes[name]
        tokens = prefix + completion.token_ids
        return replace(completion, token_ids=tokens, rollout_logprobs=None, versions=(), candidates=None)

    def pause(self, mode: PauseMode) -> None:
        if mode == "abort":
            self._whole, self._missing, self.prefixes = [], {}, {}
        self.engine.pause(mode)

    def resume(self) -> None:
        self.engine.resume()

    def update_weights(self, source: WeightSource, version: int) -> SyncReport:
        return self.engine.update_weights(source, version)

    def release(self) -> None:
        self.engine.release()

    def close(self) -> None:
        self.engine.close()

    def forget(self, sample: tuple[str, int]) -> None:
        if isinstance(self.engine, KeepsSamples):
            self.engine.forget(sample)
