"""Requests in flight: the rows of a group, and what they become when they finish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf.rollout.engine import EngineError, RolloutRequest
from rlhf.types import Candidates, Completion, FinishReason, VersionSpan


@dataclass(slots=True, eq=False)
class Row:
    """One sample of a request while it is decoded."""

    request: RolloutRequest
    index: int
    stop_ids: frozenset[int]
    versions: list[tuple[int, int]]
    """`(version, first token)`, one entry a weight update that it lived through."""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    candidates: list[Tensor] = field(default_factory=list[Tensor])
    """What each token was drawn from, itself first, where the request asks for that and truncates."""

    def append(self, token_id: int, logprob: float, candidates: Tensor | None = None) -> bool:
        """Whether the row is finished with this token."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.request.params.candidates_needed:
            assert candidates is not None
            self.candidates.append(candidates)
        return token_id in self.stop_ids or len(self.token_ids) == self.request.params.max_tokens

    def completion(self) -> Completion:
        """What was sampled so far; a row that is not finished is aborted."""
        if self.token_ids and self.token_ids[-1] in self.stop_ids:
            reason = FinishReason.STOP
        elif len(self.token_ids) == self.request.params.max_tokens:
            reason = FinishReason.LENGTH
        else:
            reason = FinishReason.ABORT
        ends = [start for _, start in self.versions[1:]] + [len(self.token_ids)]
        spans = [VersionSpan(v, start, end) for (v, start), end in zip(self.versions, ends, strict=True)]
        return Completion(
            prompt_id=self.request.prompt.id,
            index=self.index,
            token_ids=tuple(self.token_ids),
            rollout_logprobs=tuple(self.logprobs),
            finish_reason=reason,
            versions=tuple(span for span in spans if span.start < span.end),
            candidates=Candidates.of(self.candidates) if self.request.params.candidates_needed else None,
        )


def rows_of(request: RolloutRequest, eos_token_ids: Iterable[int], version: int) -> list[Row]:
    """The rows of one request, in order of `index`."""
    stop_ids = frozenset((*eos_token_ids, *request.params.stop_token_ids))
    return [Row(request, index, stop_ids, [(version, 0)]) for index in range(request.params.n)]


def check_requests(
    requests: Sequence[RolloutRequest], in_flight: Iterable[str], vocabulary: int, *, sees: bool = False
) -> None:
    """Raises EngineError for what an engine of this process cannot sample; nothing is submitted then."""
    seen = set(in_flight)
    for request in requests:
        prompt = request.prompt
        if prompt.id in seen:
            raise EngineError(f"a request for prompt {prompt.id!r} is in flight already; ids must be unique")
        seen.add(prompt.id)
        if not prompt.token_ids:
            raise EngineError(f"prompt {prompt.id!r} has no tokens; there is nothing to continue")
        if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocabulary:
            raise EngineError(
                f"prompt {prompt.id!r} has token ids from {min(prompt.token_ids)} to "
                f"{max(prompt.token_ids)}, the model has 0 to {vocabulary - 1}; was it tokenised for another?"
            )
        if prompt.images and not sees:
            raise EngineError(f"prompt {prompt.id!r} has pictures, and the model of this engine cannot see")
